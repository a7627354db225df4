"""The stages of a step: how long each takes, and its span in the step's trace."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from opentelemetry import trace
from opentelemetry.context import Context

from foundry.telemetry.traces import links_to
from services.trainer import metrics
from services.trainer.attempt import Attempt
from services.trainer.checkpoint import Progress

_tracer = trace.get_tracer(__name__)


class Stages:
    def __init__(self) -> None:
        # Of the last step, by stage.
        self.seconds: dict[str, float] = {}
        self._links: Sequence[trace.Link] = ()

    async def link(self, attempt: Attempt) -> None:
        """Have the traces of steps refer to the request that made the run."""
        self._links = links_to(await attempt.traceparent())

    def traced_step(self, attempt: Attempt, progress: Progress) -> AbstractContextManager[trace.Span]:
        """The root of the next step's trace."""
        return _tracer.start_as_current_span(
            "step",
            context=Context(),
            links=self._links,
            attributes={
                "foundry.run": attempt.claimed.run_id,
                "foundry.attempt": attempt.claimed.attempt,
                "foundry.step": progress.step + 1,
                "foundry.version": progress.policy.version,
                "foundry.digest": progress.policy.digest,
            },
        )

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        # The whole step has its span already.
        with _tracer.start_as_current_span(stage) if stage != "total" else nullcontext():
            yield
        self.seconds[stage] = time.perf_counter() - began
        metrics.STAGE_SECONDS.labels(stage).observe(self.seconds[stage])
