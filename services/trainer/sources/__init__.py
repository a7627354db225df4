"""Where the answers of a step come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from services.trainer.policy import Policy
from services.trainer.sample import Sample
from services.trainer.stages import Stages
from services.trainer.update.gradient import Signal


class SampleSource(Protocol):
    def proves_policy(self, step: int) -> bool:
        """Whether the samples after `step` updates claim to be decoded with the policy: nothing is then trained on them
        unless they are."""

    async def samples(self, step: int, policy: Policy, stages: Stages) -> Sequence[Sample]:
        """What to train on after `step` updates. Where the policy answers, that is `policy`."""

    async def signals(self, step: int, samples: Sequence[Sample]) -> Sequence[Signal]:
        """The teacher's word on what `samples` gave at `step`."""
