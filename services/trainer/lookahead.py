"""Steps in flight: answered and scored while steps before them train, as far ahead as `max_staleness` allows.

Which version answers a step follows from the step's number alone: the one after `max_staleness` updates fewer. It never
depends on how fast anything is, so that a run gives the same bits again, and a resumed one those of an undisturbed one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from opentelemetry import trace

from foundry.tasks import end
from foundry.telemetry.traces import links_to
from services.trainer.attempt import Attempt
from services.trainer.policy import Policy
from services.trainer.publish import PolicyPublisher
from services.trainer.sample import Sample
from services.trainer.sources import SampleSource
from services.trainer.stages import Stages, start_step
from services.trainer.update.gradient import Signal


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What a step trains on, and the version that was asked for it."""

    policy: Policy
    samples: Sequence[Sample]
    signals: Sequence[Signal]


@dataclass(frozen=True, slots=True)
class StepInFlight:
    span: trace.Span
    stages: Stages
    batch: asyncio.Task[StepBatch]


class Lookahead:
    def __init__(self, attempt: Attempt, source: SampleSource, publisher: PolicyPublisher) -> None:
        self._attempt, self._spec = attempt, attempt.spec
        self._source, self._publisher = source, publisher
        self._in_flight: deque[StepInFlight] = deque()
        self._links: Sequence[trace.Link] = ()
        # One step at a time in each, in their order: what is decoded together would have other bits.
        self._sampling, self._scoring = asyncio.Lock(), asyncio.Lock()

    async def link(self) -> None:
        """Have the traces of steps refer to the request that made the run."""
        self._links = links_to(await self._attempt.traceparent())

    def take(self, step: int) -> StepInFlight:
        """The step after `step` updates; those that may be answered beside it are begun. To be asked step by step."""
        end_step = min(step + self._spec.max_staleness + 1, self._spec.num_steps)
        for each in range(step + len(self._in_flight), end_step):
            self._in_flight.append(self._begin(each))
        return self._in_flight.popleft()

    async def close(self) -> None:
        """Let go of what was not taken."""
        await end(*(each.batch for each in self._in_flight))
        while self._in_flight:
            self._in_flight.popleft().span.end()

    def _begin(self, step: int) -> StepInFlight:
        span, stages = start_step(self._attempt, step, self._links), Stages()
        with trace.use_span(span):
            return StepInFlight(span, stages, asyncio.create_task(self._answer(step, span, stages)))

    async def _answer(self, step: int, span: trace.Span, stages: Stages) -> StepBatch:
        async with self._sampling:
            policy = await self._publisher.policy(max(0, step - self._spec.max_staleness))
            span.set_attributes({"foundry.version": policy.id.version, "foundry.digest": policy.id.digest})
            samples = await self._source.samples(step, policy, stages)
        async with self._scoring:
            with stages.timed("teacher"):
                signals = await self._source.signals(step, samples)
        return StepBatch(policy, samples, signals)
