"""The Lua scripts: each is called, each that is called is there, and a wheel has them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import foundry.store

ROOT = Path(__file__).parents[2]
STORE = Path(foundry.store.__file__).parent
LUA = STORE / "redis/lua"


def test_scripts_are_those_that_are_called() -> None:
    sources = "".join(path.read_text() for path in STORE.rglob("*.py"))
    called = set(re.findall(r'(?:run|run_restoring|_run|_held)\(\s*"([a-z_/]+)"', sources))
    written = {str(path.relative_to(LUA).with_suffix("")) for path in LUA.rglob("*.lua")}
    assert called == {name for name in written if not name.startswith("include/")} - {"sealed"}


def test_scripts_are_packaged() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["foundry"]
    packaged = {path for pattern in patterns for path in (ROOT / "foundry").glob(pattern)}
    assert set(LUA.rglob("*.lua")) <= packaged
