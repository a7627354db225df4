"""What goes into the next forward: one token of every decoding sequence, and prompts in chunks, in order of arrival."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from services.rollout.engine.torch.sequence import Sequence
from services.rollout.engine.torch.slots import Slots


class Scheduled(NamedTuple):
    """The next `num_tokens` uncomputed tokens of a sequence."""

    sequence: Sequence
    num_tokens: int


class Scheduler:
    """Continuous batching: a sequence joins as soon as a slot is free and leaves when it ends."""

    def __init__(self, slots: Slots, prefill_tokens_per_step: int) -> None:
        self._slots = slots
        self._prefill_tokens_per_step = prefill_tokens_per_step
        self.waiting: deque[Sequence] = deque()
        # In order of admission.
        self.running: list[Sequence] = []

    def add(self, sequences: Iterable[Sequence]) -> None:
        self.waiting.extend(sequences)

    def schedule(self) -> list[Scheduled]:
        """Decoding sequences by slot, so that neighbours are read as one, then prompts in order of admission."""
        decoding = [sequence for sequence in self.running if sequence.num_pending_tokens == 1]
        prefilling = [sequence for sequence in self.running if sequence.num_pending_tokens > 1]
        budget = self._prefill_tokens_per_step - sum(sequence.num_pending_tokens for sequence in prefilling)
        while self.waiting and budget > 0 and self._slots.any_free():
            sequence = self.waiting.popleft()
            self._slots.take(sequence)
            sequence.scheduled_at = time.perf_counter()
            self.running.append(sequence)
            prefilling.append(sequence)
            budget -= sequence.num_pending_tokens
        batch = [Scheduled(sequence, 1) for sequence in sorted(decoding, key=lambda sequence: sequence.slot)]
        budget = self._prefill_tokens_per_step
        for sequence in prefilling:
            num_tokens = min(budget, sequence.num_pending_tokens)
            if num_tokens:
                batch.append(Scheduled(sequence, num_tokens))
                budget -= num_tokens
        return batch

    def finish(self, sequence: Sequence) -> None:
        """A sequence ended or was cancelled: its slot is free for the next one."""
        if sequence.slot < 0:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._slots.free(sequence)
