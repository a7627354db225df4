"""The thread that runs the engine, and the bridge between it and asyncio.

The event loop sends commands (admit, cancel) through one queue, in order; they are carried out between two steps.
Outputs come back once per step. A fault of the engine ends the thread: every waiter gets Unavailable, and so does
whoever comes later.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from itertools import count

import structlog

from foundry.errors import FoundryError, ResourceExhausted, Unavailable
from services.rollout import metrics
from services.rollout.engine import Engine, EngineStats, SequenceRequest, TokenOutput
from services.rollout.engine_metrics import EngineMetrics
from services.rollout.timeline import Timeline

log = structlog.get_logger(__name__)

_RETRY_AFTER_SECONDS = 1.0
# In which what is decoded reaches its readers.
_FLUSH_SECONDS = 5.0


@dataclass(slots=True)
class _Open:
    """A sequence that has not ended."""

    submission: Submission
    index: int
    timeline: Timeline


class Submission:
    """The sequences of one call, admitted together.

    Iterating yields what has come since the last time, each output with its sequence's place in the call, until all
    have ended. `ended` is set when the engine has let go of all of them, for whatever reason.
    """

    def __init__(self, requests: Sequence[SequenceRequest]) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.num_open = len(requests)
        # Never full: no sequence has more outputs than tokens, and one error may follow.
        self._outputs: asyncio.Queue[tuple[int, TokenOutput] | FoundryError] = asyncio.Queue(
            maxsize=sum(request.sampling.max_new_tokens for request in requests) + 1
        )

    def put(self, item: tuple[int, TokenOutput] | FoundryError) -> None:
        self._outputs.put_nowait(item)

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, TokenOutput]]]:
        while not (self.ended.done() and self._outputs.empty()):
            outputs = [await self._outputs.get()]
            while not self._outputs.empty():
                outputs.append(self._outputs.get_nowait())
            found = [output for output in outputs if not isinstance(output, FoundryError)]
            if found:
                yield found
            for output in outputs:
                if isinstance(output, FoundryError):
                    raise output


class Driver:
    """Call everything from the event loop that `start` was called in."""

    def __init__(self, engine: Engine, metrics: EngineMetrics, *, max_sequences: int) -> None:
        """`max_sequences` bounds those that run and those that wait, together."""
        self._engine = engine
        self._metrics = metrics
        self._max_sequences = max_sequences
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._ids = count()
        self._open: dict[int, _Open] = {}
        self._refusal: str | None = None
        self._drained_at: float | None = None
        self._draining = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.failed = asyncio.Event()

    def start(self) -> None:
        stats = self._engine.stats()
        metrics.KV_SLOTS.set(stats.num_slots)
        metrics.KV_BYTES.set(stats.kv_bytes)
        self._observe(stats)
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, requests: Sequence[SequenceRequest], *, arrived_at: float) -> Submission:
        """Queue sequences together and in order. `arrived_at` is the call's `time.perf_counter()`.

        Raises ResourceExhausted if there are too many in flight, Unavailable.
        """
        if self._refusal is not None:
            raise Unavailable(self._refusal)
        if len(self._open) + len(requests) > self._max_sequences:
            raise ResourceExhausted(
                f"{len(self._open)} of {self._max_sequences} places are taken, the call needs {len(requests)}",
                retry_after_seconds=_RETRY_AFTER_SECONDS,
            )
        submission = Submission(requests)
        admitted = {next(self._ids): request for request in requests}
        now = time.perf_counter()
        for index, (sequence_id, request) in enumerate(admitted.items()):
            timeline = Timeline(self._metrics, request, arrived_at=arrived_at, submitted_at=now)
            self._open[sequence_id] = _Open(submission, index, timeline)
        self._idle.clear()
        self._commands.put(lambda: self._engine.admit(admitted))
        return submission

    def cancel(self, submission: Submission) -> None:
        """Let go of what has not ended, before the next step. Nothing happens to a submission that has."""
        sequence_ids = [sequence_id for sequence_id, each in self._open.items() if each.submission is submission]
        if sequence_ids:
            self._commands.put(lambda: self._cancel(sequence_ids))

    async def drain(self) -> None:
        """Refuse new work for ever; return when the work in flight has ended."""
        if self._drained_at is None:
            self._drained_at = time.monotonic()
            log.info("draining", num_sequences=len(self._open))
        self._refusal = self._refusal or "the server is draining"
        self._draining.set()
        await self._idle.wait()

    async def drained(self) -> None:
        """Return when `drain` was called and the work in flight has ended, whether or not its caller still waits."""
        await self._draining.wait()
        await self._idle.wait()

    def grace_left(self, grace_seconds: float) -> float:
        """What of the time for the calls in flight is left, if `drain` was called before."""
        if self._drained_at is None:
            return grace_seconds
        least = _FLUSH_SECONDS if self._idle.is_set() else 0.0
        return max(least, grace_seconds - (time.monotonic() - self._drained_at))

    async def close(self) -> None:
        """End the thread after the step in hand. What is in flight gets Unavailable."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)
        self._end_all("the server is shutting down")

    def _main(self) -> None:
        try:
            self._run()
        except Exception as error:
            log.exception("the engine failed")
            self._loop.call_soon_threadsafe(self._fail, f"the engine failed: {error!r}")

    def _run(self) -> None:
        while self._obey():
            outputs = self._engine.step()
            self._loop.call_soon_threadsafe(self._deliver, outputs, self._engine.stats())

    def _obey(self) -> bool:
        """Carry out commands; with nothing to decode, wait for the next. False when it is time to end."""
        while True:
            stats = self._engine.stats()
            if (stats.num_running or stats.num_waiting) and self._commands.empty():
                return True
            command = self._commands.get()
            if command is None:
                return False
            command()

    def _cancel(self, sequence_ids: Sequence[int]) -> None:
        for sequence_id in sequence_ids:
            self._engine.cancel(sequence_id)
        self._loop.call_soon_threadsafe(self._cancelled, sequence_ids, self._engine.stats())

    def _cancelled(self, sequence_ids: Sequence[int], stats: EngineStats) -> None:
        for sequence_id in sequence_ids:
            # It may have ended by itself before the command came through.
            if sequence_id in self._open:
                self._close_sequence(sequence_id, "abort")
        self._observe(stats)

    def _deliver(self, outputs: Sequence[TokenOutput], stats: EngineStats) -> None:
        now, num_prompt_tokens = time.perf_counter(), 0
        for output in outputs:
            each = self._open[output.sequence_id]
            num_prompt_tokens += each.timeline.token(output, now)
            each.submission.put((each.index, output))
            if output.finish_reason is not None:
                self._close_sequence(output.sequence_id, output.finish_reason)
        if outputs:
            self._metrics.prompt_tokens.inc(num_prompt_tokens)
            self._metrics.generation_tokens.inc(len(outputs))
            self._metrics.iteration_tokens.observe(num_prompt_tokens + len(outputs))
        self._observe(stats)

    def _close_sequence(self, sequence_id: int, finished_reason: str) -> None:
        closed = self._open.pop(sequence_id)
        closed.timeline.end(finished_reason)
        submission = closed.submission
        submission.num_open -= 1
        if not submission.num_open:
            submission.ended.set_result(None)
        if not self._open:
            self._idle.set()

    def _fail(self, message: str) -> None:
        self._end_all(message)
        self.failed.set()

    def _end_all(self, message: str) -> None:
        self._refusal = message
        for submission in {id(each.submission): each.submission for each in self._open.values()}.values():
            # One error each: raising a shared one would pile up the tracebacks of all.
            submission.put(Unavailable(message))
        for sequence_id in list(self._open):
            self._close_sequence(sequence_id, "abort")

    def _observe(self, stats: EngineStats) -> None:
        self._metrics.num_requests_running.set(stats.num_running)
        self._metrics.num_requests_waiting.set(stats.num_waiting)
        self._metrics.kv_cache_usage.set(stats.kv_used_bytes / stats.kv_bytes)
        metrics.KV_SLOTS_USED.set(stats.num_running)
        metrics.KV_USED_BYTES.set(stats.kv_used_bytes)
