"""What a chat template makes of more than roles and contents. Only rendering tells: templates pass over in silence what
they do not know.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from foundry.errors import InvalidArgument
from foundry.tool_formats import CalledTool, format_of

_ARGUMENTS = {"harbour_key": "harbour value"}
# Some templates take ids of nine letters and digits only.
_CALL = {"id": "abcdef123", "type": "function", "function": {"name": "probe_tool", "arguments": _ARGUMENTS}}
PROBE_TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "probe_tool",
            "description": "Look it up.",
            "parameters": {"type": "object", "properties": {"harbour_key": {"type": "string"}}},
        },
    }
]
_USER: dict[str, Any] = {"role": "user", "content": "A question."}
_CALLING: dict[str, Any] = {"role": "assistant", "tool_calls": [_CALL]}
_RESULT: dict[str, Any] = {"role": "tool", "content": "probe result", "tool_call_id": "abcdef123", "name": "probe_tool"}
PROBE_CALL: list[dict[str, Any]] = [_USER, _CALLING, _RESULT]
# Of each feature: what is rendered, and what must then be seen.
_PROBES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]] = {
    "tools": ([_USER], PROBE_TOOLS, ["probe_tool", "harbour_key"]),
    "tool_calls": (PROBE_CALL, [], ["probe_tool", "harbour_key", "harbour value"]),
    "tool_results": (PROBE_CALL, [], ["probe result"]),
    "tool_call_id": (PROBE_CALL, [], ["abcdef123"]),
    "name": ([{**_USER, "name": "probe_name"}], [], ["probe_name"]),
    "reasoning_content": ([_USER, {**_CALLING, "reasoning_content": "probe thought"}, _RESULT], [], ["probe thought"]),
}


@dataclass(frozen=True, slots=True)
class Features:
    """`renders` is what the template writes somewhere of `_PROBES`; `variables` are its own, `tool_format` is one of
    `foundry.tool_formats.FORMATS`, or "" for another or none."""

    renders: frozenset[str]
    variables: frozenset[str]
    tool_format: str


def probe(render: Callable[[list[dict[str, Any]], list[dict[str, Any]]], str], variables: frozenset[str]) -> Features:
    """`render` gives the text of messages and tools, and raises InvalidArgument where the template can't."""

    def rendered(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
        try:
            return render(messages, tools)
        except InvalidArgument:
            return ""

    renders = {
        feature
        for feature, (messages, tools, expected) in _PROBES.items()
        if all(each in rendered(messages, tools) for each in expected)
    }
    call = CalledTool("probe_tool", json.dumps(_ARGUMENTS))
    tool_format = format_of(rendered([_USER, _CALLING], []), call) if "tools" in renders else ""
    return Features(frozenset(renders), variables, tool_format)
