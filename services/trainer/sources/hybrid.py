"""One source first, then another."""

from __future__ import annotations

from collections.abc import Sequence

from services.trainer.policy import Policy
from services.trainer.sample import Sample
from services.trainer.sources import SampleSource
from services.trainer.stages import Stages
from services.trainer.update.gradient import Signal


class Hybrid:
    def __init__(self, first: SampleSource, then: SampleSource, *, num_first_steps: int) -> None:
        self._first, self._then, self._num_first_steps = first, then, num_first_steps

    def proves_policy(self, step: int) -> bool:
        return self._at(step).proves_policy(step)

    async def samples(self, step: int, policy: Policy, stages: Stages) -> Sequence[Sample]:
        return await self._at(step).samples(step, policy, stages)

    async def signals(self, step: int, samples: Sequence[Sample]) -> Sequence[Signal]:
        return await self._at(step).signals(step, samples)

    def _at(self, step: int) -> SampleSource:
        return self._first if step < self._num_first_steps else self._then
