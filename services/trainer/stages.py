"""The stages of a step: how long each takes, and its span in the step's trace."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from opentelemetry import trace
from opentelemetry.context import Context

from services.trainer import metrics
from services.trainer.attempt import Attempt

_tracer = trace.get_tracer(__name__)


def start_step(attempt: Attempt, step: int, links: Sequence[trace.Link]) -> trace.Span:
    """The root of the trace of what is done after `step` updates. Stages belong to it while it is the current span."""
    return _tracer.start_span(
        "step",
        context=Context(),
        links=links,
        attributes={
            "foundry.run": attempt.claimed.run_id,
            "foundry.attempt": attempt.claimed.attempt,
            "foundry.step": step + 1,
        },
    )


class Stages:
    """Of one step, or of what stands between steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        # The whole step has its span already.
        with _tracer.start_as_current_span(stage) if stage != "total" else nullcontext():
            yield
        self.seconds[stage] = time.perf_counter() - began
        metrics.STAGE_SECONDS.labels(stage).observe(self.seconds[stage])
