"""The Lua scripts in `lua/`, as they are sent to Redis. Each is one atomic step; its reply starts with a status.

The head of each file says its arguments and replies. `--@include NAME` stands for `lua/include/NAME.lua`.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

_LUA = files(__package__) / "lua"
_INCLUDE = re.compile(r"^--@include (\w+)\n", re.MULTILINE)


@cache
def text(name: str, *, checked: bool) -> str:
    """The script `lua/<name>.lua` in its seal. One that is `checked` runs on restored pointers only."""
    begin = _read("include/checked" if checked else "include/epoch")
    return _read("sealed").replace("--@script\n", begin + _read(name))


def _read(name: str) -> str:
    return _INCLUDE.sub(lambda found: _read(f"include/{found[1]}"), (_LUA / f"{name}.lua").read_text("utf-8"))
