"""What a run asks: training prompts in a seeded order, and held-out ones that are never trained on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TypeVar

from foundry.seeds import derive_seed

T = TypeVar("T")

# Where no held-out prompts are given one in eight is held out, at least four, at most half.
_HELDOUT_SHARE = 8
_MIN_HELDOUT = 4
# Enough for the mean over their tokens; more would only cost answers behind the whole document, and training prompts.
MAX_HELDOUT = 64


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A held-out turn and the answer that the teacher gave to it, greedily."""

    turn_ids: Sequence[int]
    answer_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Written:
    """A turn whose answer stands before the run begins, and the family of exercises that it is of."""

    turn_ids: Sequence[int]
    answer_ids: Sequence[int]
    family: str


@dataclass(frozen=True, slots=True)
class Curriculum:
    """Kept beside the run's checkpoints, so that every attempt asks the same."""

    turns: Sequence[Sequence[int]]
    heldout: Sequence[HeldOut]
    written: Sequence[Written] = ()

    def batch(self, step: int, batch_size: int, seed: int) -> list[Sequence[int]]:
        """The turns of one step: each epoch is its own permutation, and batches run on across epochs."""
        return _batch(self.turns, step, batch_size, seed)

    def written_batch(self, step: int, batch_size: int, seed: int) -> list[Written]:
        """As many of each family, as nearly as can be: one alone teaches less than the same number of several."""
        families = sorted({item.family for item in self.written})
        batch: list[Written] = []
        for index, family in enumerate(families):
            items = [item for item in self.written if item.family == family]
            share = (batch_size + index) // len(families)
            batch += _batch(items, step, share, derive_seed(seed, family))
        return batch

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Curriculum:
        values = json.loads(text)
        heldout = [HeldOut(**item) for item in values["heldout"]]
        return cls(values["turns"], heldout, tuple(Written(**item) for item in values.get("written", [])))


def hold_out(turns: Sequence[list[int]]) -> tuple[Sequence[list[int]], Sequence[list[int]]]:
    """Training and held-out turns, where a run brings only one kind."""
    num_heldout = min(max(_MIN_HELDOUT, len(turns) // _HELDOUT_SHARE), len(turns) // 2, MAX_HELDOUT)
    return turns[num_heldout:], turns[:num_heldout]


def _batch(items: Sequence[T], step: int, batch_size: int, seed: int) -> list[T]:
    places = (divmod(step * batch_size + offset, len(items)) for offset in range(batch_size))
    return [items[_order(len(items), seed, epoch)[place]] for epoch, place in places]


# Steps go through one epoch after another: the order of the current one, of each family, is all that is asked again.
@lru_cache(maxsize=8)
def _order(num_turns: int, seed: int, epoch: int) -> Sequence[int]:
    order = list(range(num_turns))
    random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
    return order
