"""The thread that runs the engine, and the bridge between it and asyncio.

The event loop sends commands (admit, cancel) through one queue, in order; they are carried out between two steps.
Outputs come back once per step. Sequences wait in a queue of our own: the engine is handed what it has places for, as
soon as one is free. A fault of the engine ends the thread: every waiter gets Unavailable, and so does
whoever comes later.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count

import structlog

from foundry.errors import FoundryError, ResourceExhausted, Unavailable
from services.rollout import metrics
from services.rollout.engine import Engine, EngineStats, FinishReason, SequenceRequest, TokenOutput
from services.rollout.engine_metrics import EngineMetrics
from services.rollout.fair_queue import FairQueue
from services.rollout.timeline import Timeline
from services.rollout.waiting_time import WaitingTime

log = structlog.get_logger(__name__)

# Where nothing is known yet, or a place is free at once.
_LEAST_RETRY_AFTER_SECONDS = 1.0
# How often an engine without work is looked at.
_LOOK_SECONDS = 1.0
# In which what is decoded reaches its readers.
_FLUSH_SECONDS = 5.0


@dataclass(slots=True)
class _Open:
    """A sequence that has not ended."""

    submission: Submission
    index: int
    request: SequenceRequest
    timeline: Timeline

    @property
    def tokens_left(self) -> int:
        return self.request.sampling.max_new_tokens - self.timeline.num_tokens


class Submission:
    """The sequences of one call, queued together.

    Iterating yields what has come since the last time, each output with its sequence's place in the call, until all
    have ended. `ended` is set when the engine has let go of all of them, for whatever reason.
    """

    def __init__(self, client: Hashable, requests: dict[int, SequenceRequest]) -> None:
        self.client, self.requests = client, requests
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.num_open = len(requests)
        # Never full: no sequence has more outputs than tokens, and one error may follow.
        self._outputs: asyncio.Queue[tuple[int, TokenOutput] | FoundryError] = asyncio.Queue(
            maxsize=sum(request.sampling.max_new_tokens for request in requests.values()) + 1
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

    def __init__(self, engine: Engine, metrics: EngineMetrics, *, max_sequences: int, max_queue_seconds: float) -> None:
        """`max_sequences` bounds those that run and those that wait, together; a client that has none yet may bring
        a call on top of that. No call waits longer than `max_queue_seconds` for its first place."""
        self._engine = engine
        self._metrics = metrics
        self._max_sequences = max_sequences
        self._max_queue_seconds = max_queue_seconds
        # Under the lock, since calls join it in the event loop and the engine's thread takes from it.
        self._queue = FairQueue(engine.stats().num_slots)
        self._lock = threading.Lock()
        self._waiting_time = WaitingTime()
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

    def submit(self, client: Hashable, requests: Sequence[SequenceRequest], *, arrived_at: float) -> Submission:
        """Queue sequences together and in order. `arrived_at` is the call's `time.perf_counter()`.

        Raises ResourceExhausted if there are too many in flight or the call would wait too long, Unavailable.
        """
        if self._refusal is not None:
            raise Unavailable(self._refusal)
        submission = Submission(client, {next(self._ids): request for request in requests})
        self._check_room(submission)
        now = time.perf_counter()
        for index, (sequence_id, request) in enumerate(submission.requests.items()):
            timeline = Timeline(self._metrics, request, arrived_at=arrived_at, submitted_at=now)
            self._open[sequence_id] = _Open(submission, index, request, timeline)
        self._idle.clear()
        with self._lock:
            _join(self._queue, submission)
        self._commands.put(self._hand_over)
        expiry = self._loop.call_later(self._max_queue_seconds, self._expire, submission)
        submission.ended.add_done_callback(lambda _: expiry.cancel())
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

    def _check_room(self, submission: Submission) -> None:
        """Raises ResourceExhausted, which says when a call like this one would get a place."""
        seconds = self._seconds_until_place(submission)
        num_open, num_more = len(self._open), len(submission.requests)
        # Whoever has nothing here is not kept out by what others have. It stays bounded: by as much again.
        bound = self._max_sequences if self._queue.num_of(submission.client) else 2 * self._max_sequences
        if num_open + num_more > bound:
            raise _exhausted(f"{num_open} sequences run or wait, of at most {bound}; the call has {num_more}", seconds)
        if seconds > self._max_queue_seconds:
            raise _exhausted(
                f"the call would wait {seconds:.0f} s for a place, at most {self._max_queue_seconds:g} s are allowed",
                seconds,
            )

    def _seconds_until_place(self, submission: Submission) -> float:
        """As it would be if the call came now."""
        with self._lock:
            tried = self._queue.copy()
        _join(tried, submission)
        left = {sequence_id: each.tokens_left for sequence_id, each in self._open.items()}
        left |= {each: request.sampling.max_new_tokens for each, request in submission.requests.items()}
        return self._waiting_time.seconds(tried, list(submission.requests), left, time.perf_counter())

    def _expire(self, submission: Submission) -> None:
        """Its time in the queue is over, unless it has begun."""
        with self._lock:
            if self._queue.has_begun(submission.requests):
                return
            self._leave(submission.requests)
        message = f"the call has waited {self._max_queue_seconds:g} s for a place"
        submission.put(_exhausted(message, self._seconds_until_place(submission)))
        for sequence_id in submission.requests:
            self._close_sequence(sequence_id, "abort")

    def _leave(self, sequence_ids: Iterable[int]) -> None:
        now = time.perf_counter()
        for sequence_id in sequence_ids:
            self._queue.end(sequence_id, now)

    def _main(self) -> None:
        try:
            self._run()
        except Exception as error:
            log.exception("the engine failed")
            self._loop.call_soon_threadsafe(self._fail, f"the engine failed: {error!r}")

    def _run(self) -> None:
        while self._obey():
            began = time.perf_counter()
            outputs = self._engine.step()
            self._waiting_time.saw_step(time.perf_counter() - began)
            with self._lock:
                self._leave(output.sequence_id for output in outputs if output.finish_reason is not None)
            self._hand_over()
            self._loop.call_soon_threadsafe(self._deliver, outputs, self._engine.stats())

    def _obey(self) -> bool:
        """Carry out commands; with nothing to decode, wait for the next. False when it is time to end."""
        while True:
            stats = self._engine.stats()
            if (stats.num_running or stats.num_waiting) and self._commands.empty():
                return True
            try:
                command = self._commands.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                # It may have ended, which its stats say.
                continue
            if command is None:
                return False
            command()

    def _hand_over(self) -> None:
        """To the engine: those whose turn it is, together and in order, as many as it has places for."""
        with self._lock:
            taken = self._queue.take(time.perf_counter())
        if taken:
            self._engine.admit({each: self._open[each].request for each in taken})

    def _cancel(self, sequence_ids: Sequence[int]) -> None:
        with self._lock:
            self._leave(sequence_ids)
        for sequence_id in sequence_ids:
            self._engine.cancel(sequence_id)
        self._hand_over()
        self._loop.call_soon_threadsafe(self._cancelled, sequence_ids, self._engine.stats())

    def _cancelled(self, sequence_ids: Sequence[int], stats: EngineStats) -> None:
        for sequence_id in sequence_ids:
            # It may have ended by itself before the command came through.
            if sequence_id in self._open:
                self._close_sequence(sequence_id, "abort")
        self._observe(stats)

    def _deliver(self, outputs: Sequence[TokenOutput], stats: EngineStats) -> None:
        now, num_prompt_tokens, num_tokens = time.perf_counter(), 0, 0
        for output in outputs:
            each = self._open[output.sequence_id]
            each.submission.put((each.index, output))
            if output.error is not None:
                # Of no token, and by no fault of its own: it says nothing about how long answers take.
                self._close_sequence(output.sequence_id, "abort")
                continue
            num_tokens += 1
            num_prompt_tokens += each.timeline.token(output, now)
            if output.finish_reason is not None:
                self._close_sequence(output.sequence_id, output.finish_reason)
        if num_tokens:
            self._metrics.prompt_tokens.inc(num_prompt_tokens)
            self._metrics.generation_tokens.inc(num_tokens)
            self._metrics.iteration_tokens.observe(num_prompt_tokens + num_tokens)
        self._observe(stats)

    def _close_sequence(self, sequence_id: int, finished_reason: str) -> None:
        closed = self._open.pop(sequence_id)
        closed.timeline.end(finished_reason)
        if finished_reason != "abort":
            cut_off = finished_reason == FinishReason.LENGTH
            self._waiting_time.saw_answer(closed.timeline.num_tokens, cut_off=cut_off)
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
        self._metrics.num_requests_waiting.set(stats.num_waiting + self._queue.num_waiting)
        self._metrics.kv_cache_usage.set(stats.kv_used_bytes / stats.kv_bytes if stats.kv_bytes else 0)
        metrics.KV_SLOTS_USED.set(stats.num_running)
        metrics.KV_USED_BYTES.set(stats.kv_used_bytes)


def _join(queue: FairQueue, submission: Submission) -> None:
    repeatable = all(request.skip_prefix_cache for request in submission.requests.values())
    queue.add(submission.client, submission.requests, time.perf_counter(), repeatable=repeatable)


def _exhausted(message: str, seconds: float) -> ResourceExhausted:
    return ResourceExhausted(message, retry_after_seconds=max(_LEAST_RETRY_AFTER_SECONDS, seconds))
