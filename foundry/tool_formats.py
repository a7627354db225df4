"""How models write tool calls in their answers, read as they come: the formats that `FORMATS` names.

    hermes      <tool_call>{"name": …, "arguments": {…}}</tool_call>, any number, text around them (Qwen, Hermes)
    llama3_json {"name": …, "parameters": {…}}, several with ; between them, and nothing else (Llama 3)
    json        {"name": …, "arguments": {…}}, or a list of them: what answers are that a grammar holds to it

What can't be read as a call is text, exactly as the model wrote it: nothing that it said is lost.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from foundry.token_text import overlap

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class CalledTool:
    """`arguments` is a JSON object as text."""

    name: str
    arguments: str


class ToolReader(ABC):
    """Tells text from calls in one answer. However the answer is cut into pieces, the same comes out.

    White space around calls is none of the text.
    """

    def __init__(self) -> None:
        self._held = ""
        # White space behind the text so far: text if more of it follows.
        self._space = ""
        self._text = ""
        self._calls: list[CalledTool] = []
        self._has_called = self._after_call = False

    def feed(self, text: str) -> tuple[str, list[CalledTool]]:
        """What is certain now: text, and calls that are complete."""
        self._held += text
        self._read(last=False)
        return self._taken()

    def close(self) -> tuple[str, list[CalledTool]]:
        """The rest, of an answer that has ended."""
        self._read(last=True)
        if not self._has_called:
            self._text += self._space
        return self._taken()

    @abstractmethod
    def _read(self, *, last: bool) -> None:
        """Take from `_held` what is certain; with `last` everything."""

    def _say(self, text: str) -> None:
        text = self._space + text
        if self._after_call:
            text = text.lstrip()
            self._after_call = not text
        said = text.rstrip()
        self._text += said
        self._space = text[len(said) :]

    def _call(self, call: CalledTool) -> None:
        self._space = ""
        self._calls.append(call)
        self._has_called = self._after_call = True

    def _taken(self) -> tuple[str, list[CalledTool]]:
        taken = self._text, self._calls
        self._text, self._calls = "", []
        return taken


class _Hermes(ToolReader):
    def _read(self, *, last: bool) -> None:
        while (begin := self._held.find(_OPEN)) >= 0:
            self._say(self._held[:begin])
            self._held = self._held[begin:]
            if not self._read_call(last=last):
                break
        else:
            # The end may be the beginning of the mark.
            num_kept = 0 if last else overlap(self._held, _OPEN)
            end = len(self._held) - num_kept
            self._say(self._held[:end])
            self._held = self._held[end:]

    def _read_call(self, *, last: bool) -> bool:
        """Whether the call that `_held` begins with is complete. At the end it may lack its closing mark."""
        end = self._held.find(_CLOSE)
        # An argument may spell the mark.
        while end >= 0:
            if call := _parsed(self._held[len(_OPEN) : end], "arguments"):
                self._call(call)
                self._held = self._held[end + len(_CLOSE) :]
                return True
            end = self._held.find(_CLOSE, end + 1)
        if last:
            if call := _parsed(self._held[len(_OPEN) :], "arguments"):
                self._call(call)
            else:
                self._say(self._held)
            self._held = ""
        return False


class _Llama3Json(ToolReader):
    def __init__(self) -> None:
        super().__init__()
        self._is_text = False

    def _read(self, *, last: bool) -> None:
        begun = self._held.lstrip()
        if (not self._is_text and begun.startswith("{")) or not begun:
            if not last:
                return
            if calls := _sequence(begun):
                for call in calls:
                    self._call(call)
                self._held = ""
        self._is_text = True
        self._say(self._held)
        self._held = ""


class _Json(ToolReader):
    def _read(self, *, last: bool) -> None:
        if last:
            for call in (calls := _all_calls(self._held.strip())):
                self._call(call)
            self._say("" if calls else self._held)
            self._held = ""


_READERS: dict[str, type[ToolReader]] = {"hermes": _Hermes, "llama3_json": _Llama3Json, "json": _Json}
FORMATS = tuple(_READERS)


def reader_of(tool_format: str) -> ToolReader:
    """Raises KeyError for a format that is none of `FORMATS`."""
    return _READERS[tool_format]()


def format_of(rendering: str, call: CalledTool) -> str:
    """The format in which a chat template wrote this one call; "" for one that isn't known."""
    found = _READERS["hermes"]()
    if [*found.feed(rendering)[1], *found.close()[1]] == [call]:
        return "hermes"
    begin = rendering.find('{"name"')
    if begin >= 0 and (value := _decoded(rendering, begin)) and _call_of(value[0], "parameters") == call:
        return "llama3_json"
    return ""


def _sequence(text: str) -> list[CalledTool]:
    """Calls with ; between them; none if anything else is there."""
    calls, begin = [], 0
    while (value := _decoded(text, begin)) and (call := _call_of(value[0], "parameters", "arguments")):
        calls.append(call)
        rest = text[value[1] :].lstrip()
        if not rest:
            return calls
        if not rest.startswith(";"):
            return []
        text, begin = rest[1:].lstrip(), 0
    return []


def _all_calls(text: str) -> list[CalledTool]:
    """What a call, or a list of calls, says; none if it is anything else."""
    value = _decoded(text, 0)
    if value is None or value[1] < len(text):
        return []
    read = [_call_of(each, "arguments") for each in (value[0] if isinstance(value[0], list) else [value[0]])]
    calls = [call for call in read if call is not None]
    return calls if len(calls) == len(read) else []


def _parsed(text: str, *keys: str) -> CalledTool | None:
    value = _decoded(text := text.strip(), 0)
    return _call_of(value[0], *keys) if value and value[1] == len(text) else None


def _decoded(text: str, begin: int) -> tuple[Any, int] | None:
    """The JSON value that begins there, and where it ends."""
    try:
        return json.JSONDecoder().raw_decode(text, begin)
    except (ValueError, RecursionError):
        return None


def _call_of(value: Any, *keys: str) -> CalledTool | None:
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str):
        return None
    arguments = next((value[key] for key in keys if key in value), None)
    return CalledTool(name, json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
