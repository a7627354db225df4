"""What a run asks: training prompts in a seeded order, and held-out ones that are never trained on."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from foundry.errors import InvalidArgument
from foundry.template import ChatTemplate, Messages
from services.trainer.sample import derive_seed

MAX_PROMPTS = 100_000


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A held-out turn and the answer that the teacher gave to it, greedily."""

    turn_ids: Sequence[int]
    answer_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Curriculum:
    """Kept with the run's checkpoints, so that every attempt asks the same."""

    turns: Sequence[Sequence[int]]
    heldout: Sequence[HeldOut]

    def batch(self, step: int, batch_size: int, seed: int) -> list[Sequence[int]]:
        """The turns of one step: each epoch is its own permutation, and batches run on across epochs."""
        return [self._at(step * batch_size + offset, seed) for offset in range(batch_size)]

    def _at(self, cursor: int, seed: int) -> Sequence[int]:
        epoch, place = divmod(cursor, len(self.turns))
        order = list(range(len(self.turns)))
        random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
        return self.turns[order[place]]

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Curriculum:
        values = json.loads(text)
        return cls(values["turns"], [HeldOut(**item) for item in values["heldout"]])


def read_prompts(text: str, template: ChatTemplate, *, field: str) -> list[list[int]]:
    """Turn ids of a prompts file: JSON lines, each {"prompt": "…" or [{role, content}, …]}; other keys are ignored.

    Raises InvalidArgument that names the line.
    """
    turns = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidArgument(f"{field}, line {number} is not JSON: {error}", field=field) from error
        turns.append(template.turn(_messages(row, f"{field}, line {number}", field)))
        if len(turns) > MAX_PROMPTS:
            raise InvalidArgument(f"{field} has more than {MAX_PROMPTS} prompts", field=field)
    if not turns:
        raise InvalidArgument(f"{field} has no prompts", field=field)
    return turns


def _messages(row: Any, where: str, field: str) -> Messages:
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
