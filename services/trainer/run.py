"""One run, from prompts to the last version: the loop of context distillation."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from foundry.errors import PolicyMismatch
from foundry.model.objectives import Objective
from foundry.rpc.teacher import TeacherClient
from services.trainer import checkpoint, metrics
from services.trainer.attempt import Attempt
from services.trainer.checkpoint import Progress
from services.trainer.control import Control
from services.trainer.publish import PolicyPublisher
from services.trainer.report import report_begin, report_heldout, report_step
from services.trainer.sample import Sample
from services.trainer.signals import signals_of
from services.trainer.sources import SampleSource
from services.trainer.stages import Stages
from services.trainer.update.gradient import Signal
from services.trainer.update.heldout import MEASURE, HeldOutSet
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
        teacher: TeacherClient,
        publisher: PolicyPublisher,
        heldout: HeldOutSet,
        stages: Stages,
        control: Control,
    ) -> None:
        """`publisher` and the run move the same `progress`."""
        self.claimed, self.spec = attempt.claimed, attempt.spec
        self.progress = progress
        self._attempt, self._training, self._source, self._teacher = attempt, training, source, teacher
        self._publisher, self._heldout, self._stages, self._control = publisher, heldout, stages, control

    async def train(self) -> Progress:
        """Train to the last step, or until cancelled; the policy at the end is durable."""
        await self._begin()
        while self.progress.step < self.spec.num_steps and await self._may_go_on():
            with self._stages.traced_step(self._attempt, self.progress):
                with self._stages.timed("total"):
                    samples = await self._source.samples(self.progress.step, self.progress.policy)
                    signals = await self._score(samples, self._training.objective)
                    update = await self._update(samples, signals)
                    await self._publish(update)
                await report_step(self._attempt, self.progress, samples, update, self._stages.seconds)
                await self._evaluate_and_keep()
        await self._end()
        return self.progress

    # The stages of one step

    async def _score(self, samples: Sequence[Sample], objective: Objective) -> list[Signal]:
        with self._stages.timed("teacher"):
            return await self._attempt.retry.call("teacher", lambda: signals_of(self._teacher, samples, objective))

    async def _update(self, samples: Sequence[Sample], signals: Sequence[Signal]) -> Update:
        metrics.STALENESS.set(self.progress.policy.version - min(sample.version for sample in samples))
        prove_policy = self._source.proves_policy(self.progress.step)
        try:
            with self._stages.timed("update"):
                update = await asyncio.to_thread(self._training.run, samples, signals, prove_policy=prove_policy)
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
        self._heldout.signals = await self._score(self._heldout.samples, MEASURE)
        if self.progress.step == 0:
            await self._evaluate()
            await self._keep()

    async def _may_go_on(self) -> bool:
        await self._control.wait_until_running()
        return not self._control.cancelled

    async def _evaluate_and_keep(self) -> None:
        step, spec = self.progress.step, self.spec
        last = step == spec.num_steps
        if last or (spec.heldout_every and step % spec.heldout_every == 0):
            await self._evaluate()
        if last or step % spec.checkpoint_every == 0:
            await self._keep()

    async def _end(self) -> None:
        if self._control.cancelled:
            await self._keep()
        await self._publisher.publish_again()
        await self._attempt.release()

    async def _evaluate(self) -> None:
        with self._stages.timed("evaluate"):
            kl = await asyncio.to_thread(self._heldout.kl, self._training.lm, self._training.cartridge)
        self.progress.heldout_kl_last = kl
        if self.progress.step == 0:
            self.progress.heldout_kl_first = kl
        await report_heldout(self._attempt, self.progress, self._heldout.num_tokens)

    async def _keep(self) -> None:
        content = checkpoint.write(self.progress, self._training)
        with self._stages.timed("checkpoint"):
            await self._attempt.save_checkpoint(self.progress.step, content)
