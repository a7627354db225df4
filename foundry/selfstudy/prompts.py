"""Files of prompts: JSON lines that users bring instead of the model's own questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foundry.errors import InvalidArgument
from foundry.roles import ROLES
from foundry.untrusted import parse_json

MAX_PROMPTS = 100_000


@dataclass(frozen=True, slots=True)
class Line:
    """A line of such a file: where it stands, its conversation, and all its keys."""

    where: str
    messages: list[dict[str, str]]
    row: Mapping[str, Any]

    @property
    def document(self) -> Any:
        """Which document it is about, if it says so; veRL's rows have it beside their prompt or in `extra_info`."""
        extra = self.row.get("extra_info")
        return self.row.get("document", extra.get("document") if isinstance(extra, Mapping) else None)

    @property
    def answer(self) -> str:
        """The answer that it has: of `messages` the last one, or its `completion`; "" without one."""
        said = self.row.get("completion") or (() if "prompt" in self.row else self.row.get("messages", ()))
        if isinstance(said, str):
            return said
        last = said[-1] if isinstance(said, list) and said else None
        content = last.get("content") if isinstance(last, Mapping) and _is_answer(last) else None
        return content if isinstance(content, str) else ""

    @property
    def prompt(self) -> str:
        """The words of all its messages."""
        return "\n".join(message["content"] for message in self.messages)


def read_prompts(text: str, *, field: str) -> list[list[dict[str, str]]]:
    """The conversation of each line: {"prompt": "…" or [{role, content}, …]}, or {"messages": […]} as chats are kept,
    whose last answer is left out; other keys are ignored.

    Raises InvalidArgument that names the line, and `field` as what was wrong.
    """
    return [line.messages for line in read_lines(text, field=field)]


def read_lines(text: str, *, field: str, most: int = MAX_PROMPTS) -> list[Line]:
    """Raises InvalidArgument as `read_prompts`, and beyond `most` lines."""
    lines = []
    for number, written in enumerate(text.splitlines(), start=1):
        if not written.strip():
            continue
        where = f"{field}, line {number}"
        try:
            row = parse_json(written)
        except InvalidArgument as error:
            raise InvalidArgument(f"{where} {error.message.removeprefix('it ')}", field=field) from error
        lines.append(Line(where, _messages(row, where, field), row))
        if len(lines) > most:
            raise InvalidArgument(f"{field} has more than {most} prompts", field=field)
    if not lines:
        raise InvalidArgument(f"{field} has no prompts", field=field)
    return lines


def _is_answer(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") == "assistant"


def _messages(row: Any, where: str, field: str) -> list[dict[str, str]]:
    prompt = row.get("prompt", row.get("messages")) if isinstance(row, Mapping) else None
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and len(prompt) > 1 and "prompt" not in row and _is_answer(prompt[-1]):
        prompt = prompt[:-1]
    well_formed = isinstance(prompt, list) and all(
        isinstance(message, Mapping) and message.get("role") in ROLES and isinstance(message.get("content"), str)
        for message in prompt
    )
    if not well_formed or not prompt:
        raise InvalidArgument(
            f'{where} has no "prompt" that is text or a list of {{"role": "{"|".join(ROLES)}", "content": text}}',
            field=field,
        )
    return [{"role": message["role"], "content": message["content"]} for message in prompt]
