"""Files of prompts: JSON lines that users bring instead of the model's own questions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from foundry.errors import InvalidArgument

MAX_PROMPTS = 100_000


def read_prompts(text: str, *, field: str) -> list[list[dict[str, str]]]:
    """The conversation of each line: {"prompt": "…" or [{role, content}, …]}; other keys are ignored.

    Raises InvalidArgument that names the line, and `field` as what was wrong.
    """
    prompts = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidArgument(f"{field}, line {number} is not JSON: {error}", field=field) from error
        prompts.append(_messages(row, f"{field}, line {number}", field))
        if len(prompts) > MAX_PROMPTS:
            raise InvalidArgument(f"{field} has more than {MAX_PROMPTS} prompts", field=field)
    if not prompts:
        raise InvalidArgument(f"{field} has no prompts", field=field)
    return prompts


def _messages(row: Any, where: str, field: str) -> list[dict[str, str]]:
    prompt = row.get("prompt") if isinstance(row, Mapping) else None
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    well_formed = isinstance(prompt, list) and all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in prompt
    )
    if not well_formed or not prompt:
        raise InvalidArgument(f'{where} has no "prompt" that is text or a list of role and content', field=field)
    return [{"role": message["role"], "content": message["content"]} for message in prompt]
