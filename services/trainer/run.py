"""One run, from prompts to the last version: the loop of context distillation."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from foundry.errors import PolicyMismatch
from services.trainer import checkpoint, metrics
from services.trainer.attempt import Attempt
from services.trainer.checkpoint import Progress
from services.trainer.control import Control
from services.trainer.measurements import Measurements
from services.trainer.publish import PolicyPublisher
from services.trainer.report import report_begin, report_step
from services.trainer.sample import Sample
from services.trainer.sources import SampleSource
from services.trainer.stages import Stages
from services.trainer.update.gradient import Signal
from services.trainer.update.schedule import learning_rate_scale
from services.trainer.update.step import TrainingStep, Update


class Run:
    """An attempt at a run with everything it trains with; `services.trainer.prepare` makes one."""

    def __init__(
        self,
        attempt: Attempt,
        progress: Progress,
        training: TrainingStep,
        *,
        source: SampleSource,
        publisher: PolicyPublisher,
        measurements: Measurements,
        stages: Stages,
        control: Control,
    ) -> None:
        """`publisher` and the run move the same `progress`."""
        self.claimed, self.spec = attempt.claimed, attempt.spec
        self.progress = progress
        self._attempt, self._training, self._source = attempt, training, source
        self._publisher, self._measurements, self._stages, self._control = publisher, measurements, stages, control

    async def train(self) -> Progress:
        """Train to the last step, or until it is cancelled or learns no more; what it ends with is durable."""
        await self._begin()
        while await self._goes_on():
            with self._stages.traced_step(self._attempt, self.progress):
                with self._stages.timed("total"):
                    samples = await self._source.samples(self.progress.step, self.progress.policy)
                    with self._stages.timed("teacher"):
                        signals = await self._source.signals(self.progress.step, samples)
                    update = await self._update(samples, signals)
                    await self._publish(update)
                await report_step(self._attempt, self.progress, samples, update, self._stages.seconds)
                await self._evaluate_and_keep()
        await self._end()
        return self.progress

    # The stages of one step

    async def _update(self, samples: Sequence[Sample], signals: Sequence[Signal]) -> Update:
        step = self.progress.step
        if prove_policy := self._source.proves_policy(step):
            metrics.STALENESS.set(self.progress.policy.version - min(sample.version for sample in samples))
        scale = learning_rate_scale(self.spec, step)
        try:
            with self._stages.timed("update"):
                update = await asyncio.to_thread(
                    self._training.run, samples, signals, prove_policy=prove_policy, learning_rate_scale=scale
                )
        except PolicyMismatch as error:
            metrics.REFUSED.labels(error.reason).inc()
            raise
        self.progress.step += 1
        self.progress.tokens_seen += update.num_tokens
        return update

    async def _publish(self, update: Update) -> None:
        with self._stages.timed("publish"):
            await self._publisher.publish(update)

    # Around the steps

    async def _begin(self) -> None:
        report_begin(self.progress, self.spec)
        await self._attempt.acquire()
        await self._stages.link(self._attempt)
        await self._publisher.publish()
        await self._measurements.begin()
        if self.progress.step == 0:
            await self._measurements.take()
            await self._keep()

    async def _goes_on(self) -> bool:
        if self.progress.step >= self.spec.num_steps or self._learns_no_more:
            return False
        await self._control.wait_until_running()
        return not self._control.cancelled

    @property
    def _learns_no_more(self) -> bool:
        return 0 < self.spec.patience <= self.progress.num_no_better

    async def _evaluate_and_keep(self) -> None:
        step, spec = self.progress.step, self.spec
        last = step == spec.num_steps
        if last or (spec.heldout_every and step % spec.heldout_every == 0):
            await self._measurements.take()
        if last or step % spec.checkpoint_every == 0:
            await self._keep()

    async def _end(self) -> None:
        if self.progress.step < self.spec.num_steps:
            await self._keep()
        await self._publisher.publish_again()
        best = self.progress.best
        if best is not None and best.policy.digest != self.progress.policy.digest and not self._control.cancelled:
            await self._publisher.publish_best(best)
        await self._attempt.release()

    async def _keep(self) -> None:
        content = checkpoint.write(self.progress, self._training)
        with self._stages.timed("checkpoint"):
            await self._attempt.save_checkpoint(self.progress.step, content)
