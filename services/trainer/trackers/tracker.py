"""A tracker behind a thread of its own: the run tells it what happens and never waits for it, nor fails with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from functools import partial
from queue import Queue
from threading import Thread
from typing import Any, Protocol, TypeVar

import structlog

from foundry.errors import FoundryError, ResourceExhausted
from services.trainer import metrics

log = structlog.get_logger(__name__)
Event = Mapping[str, Any]
Result = TypeVar("Result")
# Events that may wait for a tracker; what comes then is not tracked.
MAX_WAITING = 1000


class Sink(Protocol):
    """What a tracker's library is asked for, always from one thread. It may raise anything, and take its time."""

    def write(self, event: Event) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """What fails is counted in foundry_trainer_tracker_failures_total and, the first time, said in the log."""

    def __init__(self, name: str, open_sink: Callable[[], Sink]) -> None:
        self._name, self._open = name, open_sink
        self._failed = False
        self._events: Queue[Event | None] = Queue()
        # With the run's id in its lines of the log.
        self._thread = Thread(target=copy_context().run, args=(self._work,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def tell(self, event: Event) -> None:
        """Never waits."""
        if self._events.qsize() < MAX_WAITING:
            self._events.put(event)
        else:
            self._fail(ResourceExhausted(f"{MAX_WAITING} events wait for it: it is too slow, or hangs"))

    def end(self) -> None:
        """There is no more to come."""
        self._events.put(None)

    def join(self, timeout_seconds: float) -> None:
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            log.warning("tracker left behind", tracker=self._name, waiting=self._events.qsize())

    def _work(self) -> None:
        sink = self._guarded(self._open)
        while (event := self._events.get()) is not None:
            if sink is not None:
                # Each event by itself: a disk that is full now may not stay so.
                self._guarded(partial(sink.write, event))
        if sink is not None:
            self._guarded(sink.close)

    def _guarded(self, work: Callable[[], Result]) -> Result | None:
        try:
            return work()
        except Exception as error:
            self._fail(error)
            return None

    def _fail(self, error: Exception) -> None:
        metrics.TRACKER_FAILURES.labels(self._name).inc()
        if not self._failed:
            self._failed = True
            reason = error.reason if isinstance(error, FoundryError) else type(error).__name__
            log.warning("tracker failed", tracker=self._name, reason=reason, error=str(error))


def close(trackers: Sequence[Tracker], timeout_seconds: float) -> None:
    """Once they have taken what waits, or after `timeout_seconds` for all of them; then they are left behind."""
    for tracker in trackers:
        tracker.end()
    deadline = time.monotonic() + timeout_seconds
    for tracker in trackers:
        tracker.join(max(0.0, deadline - time.monotonic()))
