"""What a run measures between its steps, on what it never trains on; and which of its versions is the best by that."""

from __future__ import annotations

import asyncio
from functools import partial

from services.trainer.attempt import Attempt
from services.trainer.checkpoint import Best, Progress
from services.trainer.publish import PolicyPublisher
from services.trainer.report import report_heldout
from services.trainer.signals import Teachers
from services.trainer.stages import Stages
from services.trainer.update.heldout import MEASURE, Distance, HeldOutSet
from services.trainer.update.step import TrainingStep

BEST = "best"


class Measurements:
    """`heldout` is about the document, `general` about nothing in particular."""

    def __init__(
        self,
        attempt: Attempt,
        progress: Progress,
        training: TrainingStep,
        teachers: Teachers,
        publisher: PolicyPublisher,
        *,
        heldout: HeldOutSet,
        general: HeldOutSet,
    ) -> None:
        self._attempt, self._progress, self._training = attempt, progress, training
        self._teachers, self._publisher = teachers, publisher
        self._heldout, self._general = heldout, general

    async def begin(self) -> None:
        """Ask the teacher, once, for what everything is measured against."""
        for each in (self._heldout, self._general):
            ask = partial(self._teachers.signals, each.samples, MEASURE)
            each.signals = await self._attempt.retry.call("teacher", ask)

    async def take(self) -> None:
        """Measure the policy as it stands, say so, and tag it if there was no better one."""
        progress, lm, cartridge = self._progress, self._training.lm, self._training.cartridge
        with Stages().timed("evaluate"):
            distance = await asyncio.to_thread(self._heldout.distance, lm, cartridge)
            general = await asyncio.to_thread(self._general.distance, lm, cartridge) if self._general.samples else None
        progress.heldout_kl_last = distance.kl
        if progress.step == 0:
            progress.heldout_kl_first = distance.kl
        if progress.best is None or self._judged(distance) < self._judged(progress.best):
            # Durably first: a version that was only hot may be lost with Redis while it is measured.
            policy = await self._publisher.publish_again()
            progress.best, progress.num_no_better = Best(policy, progress.step, distance.kl, distance.nll), 0
            await self._attempt.tag(BEST, policy.version)
        else:
            progress.num_no_better += 1
        await report_heldout(self._attempt, progress, self._heldout.num_tokens, distance, general)

    def _judged(self, distance: Distance | Best) -> float:
        return distance.nll if self._attempt.spec.is_surer else distance.kl
