"""How the house stands: arrows point down, none in circles, a name means one thing, torch stays behind its door."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Who stands above whom in the library. A room imports from its own floor and from those below; rooms of one floor
# are apart.
FLOORS = (
    {"foundry.__main__"},
    {"foundry.cli"},
    {"foundry.local", "foundry.evaluation", "foundry.adapters"},
    {
        "foundry.client",
        "foundry.corpus",
        "foundry.formats",
        "foundry.recipes",
        "foundry.selfstudy",
        "foundry.sizing",
        "foundry.settings",
    },
    {"foundry.rpc"},
    {"foundry.store", "foundry.model"},
    {
        *("foundry.telemetry", "foundry.identity", "foundry.buffers", "foundry.seeds", "foundry.validation"),
        "foundry.certificates",
    },
    {
        *("foundry.extras", "foundry.variables", "foundry.tasks", "foundry.roles", "foundry.untrusted"),
        *("foundry.tenants", "foundry.confined"),
    },
    {"foundry.tool_formats"},
    {"foundry.errors", "foundry.token_text"},
    {"foundry.v1"},
)
SERVICES = ("gateway", "rollout", "teacher", "trainer")
TORCH = {"torch", "transformers", "safetensors"}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((*ROOT.glob("foundry/**/*.py"), *ROOT.glob("services/**/*.py"))):
        if "_pb2" not in path.name:
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def statements(node: ast.AST, *, everywhere: bool) -> Iterator[ast.AST]:
    """Those that run when a module is imported; with `everywhere` also what functions import when they are called."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if everywhere or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from statements(child, everywhere=everywhere)


def imported(module: str, *, everywhere: bool = False) -> set[str]:
    """Modules of the house by their whole names, and other packages."""
    names: set[str] = set()
    for node in statements(tree(module), everywhere=everywhere):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inner}
    return names - {module}


def floor(module: str) -> tuple[int, str]:
    room = ".".join(module.split(".")[:2])
    return next((number, room) for number, rooms in enumerate(FLOORS) if room in rooms)


def test_no_circles() -> None:
    arrows = {module: {name for name in imported(module) if name in MODULES} for module in MODULES}
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    "module", [module for module in MODULES if module.count(".") and module.startswith("foundry.")]
)
def test_the_library_points_down(module: str) -> None:
    level, room = floor(module)
    for name in imported(module, everywhere=True):
        assert not name.startswith("services"), f"{module} imports {name}"
        if name.startswith("foundry.") and floor(name)[1] != room:
            assert floor(name)[0] > level, f"{module} imports {name}, which is not below it"


@pytest.mark.parametrize("service", SERVICES)
def test_services_are_apart(service: str) -> None:
    for module in MODULES:
        if module.startswith(f"services.{service}."):
            others = {name for name in imported(module, everywhere=True) if name.startswith("services.")}
            assert all(name.startswith(f"services.{service}") for name in others), f"{module} imports {others}"


@pytest.mark.parametrize("top", ["foundry.cli.main", "foundry.client", "foundry.store", "services.gateway.main"])
def test_torch_stays_behind_its_door(top: str) -> None:
    seen, waiting = set(), [top]
    while waiting:
        module = waiting.pop()
        if module in MODULES and module not in seen:
            seen.add(module)
            found = imported(module)
            assert not {name.partition(".")[0] for name in found} & TORCH, (
                f"{top} reaches {module}, which imports torch"
            )
            packages = {".".join(name.split(".")[:end]) for name in found for end in range(1, name.count(".") + 2)}
            waiting += found | packages


def test_a_public_class_name_means_one_thing() -> None:
    homes: defaultdict[str, list[str]] = defaultdict(list)
    for module in MODULES:
        for node in tree(module).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(module)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}
