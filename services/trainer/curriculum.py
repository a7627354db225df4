"""What a run asks: training prompts in a seeded order, and held-out ones that are never trained on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from foundry.seeds import derive_seed


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
