"""What a run asks: training prompts in a seeded order, and held-out ones that are never trained on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

from foundry.seeds import derive_seed

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
class Curriculum:
    """Kept beside the run's checkpoints, so that every attempt asks the same."""

    turns: Sequence[Sequence[int]]
    heldout: Sequence[HeldOut]

    def batch(self, step: int, batch_size: int, seed: int) -> list[Sequence[int]]:
        """The turns of one step: each epoch is its own permutation, and batches run on across epochs."""
        places = (divmod(step * batch_size + offset, len(self.turns)) for offset in range(batch_size))
        return [self.turns[_order(len(self.turns), seed, epoch)[place]] for epoch, place in places]

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Curriculum:
        values = json.loads(text)
        return cls(values["turns"], [HeldOut(**item) for item in values["heldout"]])


def hold_out(turns: Sequence[list[int]]) -> tuple[Sequence[list[int]], Sequence[list[int]]]:
    """Training and held-out turns, where a run brings only one kind."""
    num_heldout = min(max(_MIN_HELDOUT, len(turns) // _HELDOUT_SHARE), len(turns) // 2, MAX_HELDOUT)
    return turns[num_heldout:], turns[:num_heldout]


# Steps go through one epoch after another: the order of the current one is all that is asked for again.
@lru_cache(maxsize=1)
def _order(num_turns: int, seed: int, epoch: int) -> Sequence[int]:
    order = list(range(num_turns))
    random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
    return order
