"""In which order a run goes through its data: every step by its seed, each epoch in an order of its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from foundry.seeds import derive_seed
from services.trainer.data.conversation import Conversation

if TYPE_CHECKING:
    from foundry.store import RunSpec

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Curriculum:
    """What a run asks, has asked and never asks, from one data set."""

    # Of the data set's content.
    digest: str
    # For the policy to answer.
    asked: Sequence[Conversation]
    # Answered before the run began.
    written: Sequence[Conversation]
    heldout: Sequence[Conversation]
    # About no document: answered, and held out.
    general: Sequence[Conversation] = ()
    general_heldout: Sequence[Conversation] = ()

    def asked_batch(self, step: int, spec: RunSpec) -> list[Conversation]:
        """What the policy answers after `step` updates, each `samples_per_prompt` times."""
        return self._with_general(_batch(self.asked, step, spec.batch_size, spec.seed), step, spec)

    def written_batch(self, step: int, spec: RunSpec) -> list[Conversation]:
        """As many of each family, as nearly as can be: one alone teaches less than the same number of several."""
        families = sorted({item.family for item in self.written})
        size = spec.batch_size * spec.samples_per_prompt
        batch: list[Conversation] = []
        for index, family in enumerate(families):
            items = [item for item in self.written if item.family == family]
            share = (size + index) // len(families)
            batch += _batch(items, step, share, derive_seed(spec.seed, family))
        return self._with_general(batch, step, spec)

    def _with_general(self, batch: list[Conversation], step: int, spec: RunSpec) -> list[Conversation]:
        """The last places go to general prompts, as many as keep their share over the steps so far."""
        before, after = (int(each * len(batch) * spec.general_share) for each in (step, step + 1))
        if not self.general or after == before:
            return batch
        general = [
            self.general[_order(len(self.general), derive_seed(spec.seed, "general"), epoch)[place]]
            for epoch, place in (divmod(number, len(self.general)) for number in range(before, after))
        ]
        return [*batch[: len(batch) - len(general)], *general]


def _batch(items: Sequence[T], step: int, batch_size: int, seed: int) -> list[T]:
    """Batches run on across epochs."""
    places = (divmod(step * batch_size + offset, len(items)) for offset in range(batch_size))
    return [items[_order(len(items), seed, epoch)[place]] for epoch, place in places]


# Steps go through one epoch after another: the order of the current one, of each family, is all that is asked again.
@lru_cache(maxsize=8)
def _order(num_items: int, seed: int, epoch: int) -> Sequence[int]:
    order = list(range(num_items))
    random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
    return order
