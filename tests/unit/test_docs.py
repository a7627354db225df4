"""The documentation names what there is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from docs import make_cli

ROOT = Path(__file__).parents[2]


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.split(r"[\[<>=!~;, ]", entry)[0] for entry in declared}
    listed = set(re.findall(r"^\| ([a-z0-9.-]+) \|", (ROOT / "docs" / "dependencies.md").read_text(), re.MULTILINE))
    assert listed - {"package"} == names


def test_the_page_of_the_command_line_is_what_the_commands_say() -> None:
    assert make_cli.PAGE.read_text() == make_cli.page()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/decisions.md"])
def test_named_paths_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    named = re.findall(r"`((?:foundry|services|proto|docs|examples|tests|benchmarks|deploy)/[\w./-]*)`", text)
    assert named or page == "docs/decisions.md"
    missing = [path for path in named if not (ROOT / path).exists()]
    assert missing == []


def test_make_targets_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"make ([a-z0-9-]+)", (ROOT / page).read_text()))
        assert named <= targets, page
