"""One run, from prompts to the last version: the loop of context distillation."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from opentelemetry import trace

from foundry.errors import FoundryError, PolicyMismatch
from foundry.model.cartridge import Cartridge
from services.trainer import checkpoint, metrics
from services.trainer.attempt import Attempt
from services.trainer.background import Background
from services.trainer.checkpoint import Progress
from services.trainer.control import Control
from services.trainer.lookahead import Lookahead, StepBatch
from services.trainer.measurements import Measurements
from services.trainer.policy import Policy
from services.trainer.publish import PolicyPublisher
from services.trainer.report import report_begin, report_step
from services.trainer.sources import SampleSource
from services.trainer.stages import Stages
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
        control: Control,
    ) -> None:
        """`publisher` and the run move the same `progress`."""
        self.claimed, self.spec = attempt.claimed, attempt.spec
        self.progress = progress
        self._attempt, self._training, self._source = attempt, training, source
        self._publisher, self._measurements, self._control = publisher, measurements, control
        self._lookahead = Lookahead(attempt, source, publisher)
        self._reporting, self._keeping = Background(), Background()
        # It was put aside before its last step, as was wanted.
        self.paused = False

    async def train(self) -> Progress:
        """Train to the last step, or until it is paused, cancelled or learns no more; what it ends with is durable."""
        try:
            await self._begin()
            while await self._goes_on():
                step = self._lookahead.take(self.progress.step)
                with trace.use_span(step.span, end_on_exit=True):
                    with step.stages.timed("total"):
                        batch = await step.batch
                        update = await self._update(batch, step.stages)
                        publication = await self._publish(update, step.stages)
                    await self._report(publication, batch, update, step.stages)
                    await self._evaluate_and_keep()
            await self._put_aside()
            if not self.paused:
                await self._end()
            return self.progress
        except FoundryError:
            # What was trained before it is out, and said to be.
            with suppress(FoundryError):
                await self._reporting.settle()
            raise
        finally:
            await self._close()

    # The stages of one step

    async def _update(self, batch: StepBatch, stages: Stages) -> Update:
        step, policy = self.progress.step, batch.policy
        prove_policy = self._source.proves_policy(step)
        stale = prove_policy and policy.step < step
        try:
            with stages.timed("update"):
                update = await asyncio.to_thread(
                    self._training.run,
                    batch.samples,
                    batch.signals,
                    prove_policy=prove_policy,
                    claimed=Cartridge.from_bytes(policy.stored) if stale else None,
                    learning_rate_scale=learning_rate_scale(self.spec, step),
                )
        except PolicyMismatch as error:
            metrics.REFUSED.labels(error.reason).inc()
            raise
        self.progress.step += 1
        self.progress.tokens_seen += update.num_tokens
        return update

    async def _publish(self, update: Update, stages: Stages) -> asyncio.Task[Policy]:
        # One version at a time: the one before is out, and said to be.
        await self._reporting.settle()
        publication = self._publisher.publish(update, stages)
        if not self.spec.max_staleness:
            await publication
        return publication

    async def _report(
        self, publication: asyncio.Task[Policy], batch: StepBatch, update: Update, stages: Stages
    ) -> None:
        async def report() -> None:
            await report_step(self._attempt, await publication, batch, update, stages.seconds)

        await self._reporting.start(report())
        if not self.spec.max_staleness:
            await self._reporting.settle()

    # Around the steps

    async def _begin(self) -> None:
        report_begin(self.progress, self.spec)
        await self._attempt.acquire()
        await self._lookahead.link()
        await self._publisher.begin()
        await self._measurements.begin()
        if self.progress.step == 0:
            await self._measurements.take()
            await self._keep()

    async def _goes_on(self) -> bool:
        if self.progress.step >= self.spec.num_steps or self._learns_no_more:
            return False
        self._keeping.check()
        if await self._control.goes_on():
            return True
        # Said once: the wish may change while all is kept.
        self.paused = not self._control.cancelled
        return False

    @property
    def _learns_no_more(self) -> bool:
        return 0 < self.spec.patience <= self.progress.num_no_better

    async def _evaluate_and_keep(self) -> None:
        step, spec = self.progress.step, self.spec
        last = step == spec.num_steps
        if last or (spec.heldout_every and step % spec.heldout_every == 0):
            await self._reporting.settle()
            await self._measurements.take()
        if last or step % spec.checkpoint_every == 0:
            await self._keep()

    async def _put_aside(self) -> None:
        """What stands is kept for however long it waits: a checkpoint, and the newest version durably."""
        await self._reporting.settle()
        await self._lookahead.close()
        if self.progress.step < self.spec.num_steps:
            await self._keep()
        await self._keeping.settle()
        await self._publisher.publish_again()

    async def _end(self) -> None:
        best = self.progress.best
        if best is not None and best.policy.digest != self.progress.policy.digest and not self._control.cancelled:
            await self._publisher.publish_best(best)
        await self._attempt.release()

    async def _keep(self) -> None:
        """Copy all that stands, and store it: beside the next steps, where steps go on beside each other."""
        await self._reporting.settle()
        older = await self._publisher.older()
        content = await asyncio.to_thread(checkpoint.write, self.progress, self._training, older)
        await self._keeping.start(self._store(self.progress.step, content))
        if not self.spec.max_staleness:
            await self._keeping.settle()

    async def _store(self, step: int, content: bytes) -> None:
        with Stages().timed("checkpoint"):
            await self._attempt.save_checkpoint(step, content)

    async def _close(self) -> None:
        """Leave nothing that goes on, if the run can't."""
        await self._lookahead.close()
        await self._reporting.close()
        await self._publisher.close()
        await self._keeping.close()
