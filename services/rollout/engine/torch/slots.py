"""Which sequence has which slot, and what a free slot still holds: the prefix cache.

KV depends on the tokens before it and on the cartridges before those, so a slot's content is keyed by the tuple of
digests. Names and versions play no part. The tenant does: nobody learns from the time of an answer what others asked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

from services.rollout.engine.torch.kv import SlotKV
from services.rollout.engine.torch.sequence import Sequence


@dataclass(slots=True)
class _Slot:
    """`sequence` while it is taken; what the last one had and when it left, while it is free."""

    index: int
    sequence: Sequence | None = None
    tenant: str = ""
    digests: tuple[str, ...] = ()
    ids: list[int] = field(default_factory=list)
    freed_at: int = 0

    def match(self, sequence: Sequence) -> int:
        """How many of the sequence's tokens have their KV here. The last one is always left to compute."""
        if sequence.sampling.num_prompt_logprobs is not None:
            # Tokens whose KV is reused have no logits.
            return 0
        holder = self.sequence
        if holder is None:
            tenant, digests, ids = self.tenant, self.digests, self.ids
        else:
            tenant, digests, ids = holder.tenant, holder.digests, holder.computed_ids
        same = (tenant, digests) == (sequence.tenant, sequence.digests)
        return _common_prefix(ids, sequence.token_ids[:-1]) if same else 0


class Slots:
    """Gives each admitted sequence a slot, and with it the longest prefix that is already computed."""

    def __init__(self, kv: SlotKV) -> None:
        self._kv = kv
        self._slots = [_Slot(index) for index in range(kv.num_slots)]
        self._clock = count(1)

    def any_free(self) -> bool:
        return any(slot.sequence is None for slot in self._slots)

    def take(self, sequence: Sequence) -> None:
        """Sets the sequence's slot and how many of its tokens are computed."""
        free = [slot for slot in self._slots if slot.sequence is None]
        if sequence.skip_prefix_cache:
            # Not the oldest: on an idle server equal batches then lie in equal places and give equal bits.
            slot, num_cached = free[0], 0
        else:
            source = max(self._slots, key=lambda slot: (slot.match(sequence), slot.sequence is None))
            num_cached = source.match(sequence)
            slot = min(free, key=lambda slot: slot.freed_at)
            if num_cached and source.sequence is None and num_cached == len(source.ids):
                # The conversation goes on where it is. Taking the slot for less would throw away the rest of it.
                slot = source
            elif num_cached and source is not slot:
                self._kv.copy(source.index, slot.index, num_cached)
        slot.sequence = sequence
        sequence.slot = slot.index
        sequence.num_cached_tokens = sequence.num_computed_tokens = num_cached

    def free(self, sequence: Sequence) -> None:
        slot = self._slots[sequence.slot]
        slot.sequence, slot.freed_at = None, next(self._clock)
        slot.tenant, slot.digests, slot.ids = sequence.tenant, sequence.digests, sequence.computed_ids


def _common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the common beginning: compares slices, which is far faster than a loop over ids."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
