"""The queue that workers take runs from, and what workers say about the runs that they hold.

A worker claims a run under a lease; each claim counts `attempt` up, and that number is the fencing token in everything
that the worker does. A worker that stops sending heartbeats loses the run to the next one that asks.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from foundry.errors import DigestMismatch, Fenced, InvalidArgument, RunNotFound, RunOver
from foundry.identity import Buffer
from foundry.store.names import check_run, check_tenant_of
from foundry.store.objects.checkpoints import Checkpoints
from foundry.store.objects.objects import Objects
from foundry.store.objects.runs import FinalState, RunArchive
from foundry.store.record import ClaimedRun, Desired, RunState, desired_of
from foundry.store.redis.connection import RESTORE, Connection, Reply
from foundry.store.redis.keys import key
from foundry.store.settings import StoreSettings
from foundry.store.spec import RunSpec
from foundry.store.unreadable import reading, skipped
from foundry.untrusted import parse_object

MAX_EVENT_BYTES = 64 * 2**10
# Between two looks at a run that another worker holds or that is paused.
_SECONDS_BETWEEN_CLAIMS = 1.0


class RunQueue:
    """All methods raise StoreUnavailable when Redis or the object storage can't be reached."""

    def __init__(self, connection: Connection, objects: Objects, settings: StoreSettings) -> None:
        self._connection = connection
        self._archive = RunArchive(objects)
        self._checkpoints = Checkpoints(objects)
        self._settings = settings
        self._events_length = settings.event_stream_length

    async def claim(self, worker: str, lease_seconds: float, *, timeout_seconds: float = 0.0) -> ClaimedRun | None:
        """Take up a run: one whose worker went silent, else the longest queued; None if none in `timeout_seconds`."""
        return await self._claimed(
            lambda: self._run("runs/claim", worker, to_ms(lease_seconds), self._events_length),
            lambda seconds: self._connection.wait_for_token(key("runs", "bell"), seconds),
            timeout_seconds,
        )

    async def claim_run(
        self, run_id: str, worker: str, lease_seconds: float, *, timeout_seconds: float = 0.0
    ) -> ClaimedRun | None:
        """Take up this run; None if for `timeout_seconds` another worker holds it or it is paused.

        Raises RunNotFound, RunOver.
        """
        check_run(run_id, field="run_id")

        async def ask() -> Reply:
            reply = await self._run("runs/claim_run", run_id, worker, to_ms(lease_seconds), self._events_length)
            if reply[0] == "over":
                raise RunOver(f"run {run_id} has {reply[1]} already", field="run_id")
            if reply[0] == "damaged":
                raise DigestMismatch(f"{key('run', run_id)} in Redis is damaged: {RESTORE}")
            return reply

        return await self._claimed(
            ask,
            # The bell would be taken from a worker that takes any run.
            lambda seconds: asyncio.sleep(min(seconds, _SECONDS_BETWEEN_CLAIMS)),
            timeout_seconds,
        )

    async def _claimed(
        self,
        ask: Callable[[], Awaitable[Reply]],
        wait: Callable[[float], Awaitable[None]],
        timeout_seconds: float,
    ) -> ClaimedRun | None:
        deadline = time.monotonic() + timeout_seconds
        while True:
            reply = await ask()
            if reply[0] == "ok":
                if claimed := await self._begin(reply):
                    return claimed
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            ms_until_free = int(reply[1])
            await wait(left if ms_until_free < 0 else min(left, ms_until_free / 1000))

    async def _begin(self, reply: Reply) -> ClaimedRun | None:
        """What was claimed; None if it has to be claimed again, or is now over."""
        run_id, attempt, desired = reply[1], int(reply[2]), _desired(reply[4])
        # Before the worker acts: an attempt that did anything must not be forgotten with Redis.
        if not await self._archive.begin_attempt(run_id, attempt):
            # Redis forgot that it gave this attempt out, perhaps to a worker that still acts on it: the next.
            with suppress(Fenced):
                await self.requeue(run_id, attempt)
        elif desired is Desired.CANCEL:
            await self.finish(run_id, attempt, RunState.CANCELLED)
        else:
            try:
                with reading(f"{key('run', run_id)} in Redis"):
                    spec = RunSpec.from_json(reply[3])
                    tenant = check_tenant_of(reply[5], spec.name)
            except DigestMismatch as error:
                # Whoever claimed it next would meet the same.
                await self.finish(run_id, attempt, RunState.FAILED, error=f"{error.reason}: {error.message}")
            else:
                return ClaimedRun(run_id=run_id, attempt=attempt, spec=spec, desired=desired, tenant=tenant)
        return None

    async def heartbeat(
        self,
        run_id: str,
        attempt: int,
        lease_seconds: float,
        *,
        state: RunState = RunState.RUNNING,
        waiting_for: str = "",
    ) -> Desired:
        """Extend the lease, say how it stands (running or waiting) and learn what is wanted.

        Raises Fenced if the run is over or another attempt holds it: stop at once.
        """
        if state not in (RunState.RUNNING, RunState.WAITING):
            raise InvalidArgument(f"a worker can't be {state}", field="state")
        reply = await self._held(
            "runs/heartbeat", run_id, attempt, to_ms(lease_seconds), state, waiting_for, self._events_length
        )
        return _desired(reply[1])

    async def report(self, run_id: str, attempt: int, event: Mapping[str, Any]) -> str:
        """Append an event, at most 64 KiB as JSON, and return its id. Raises Fenced, InvalidArgument."""
        if event.get("type") == "finished":
            raise InvalidArgument("events of type 'finished' are the store's own", field="event")
        try:
            text = json.dumps(event, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"the event is not JSON: {error}", field="event") from error
        if len(text) > MAX_EVENT_BYTES:
            raise InvalidArgument(f"the event has {len(text)} bytes, at most {MAX_EVENT_BYTES} are kept", field="event")
        return str((await self._held("runs/report", run_id, attempt, text, self._events_length))[1])

    async def requeue(self, run_id: str, attempt: int, *, result: Mapping[str, Any] | None = None) -> None:
        """Give a run back unfinished, so that another worker takes it at once, or once it is resumed if it is to be
        paused; one that is to be cancelled ends so, with `result`. Raises Fenced."""
        if (await self._held("runs/requeue", run_id, attempt, self._events_length))[0] == "cancel":
            await self.finish(run_id, attempt, RunState.CANCELLED, result=result)

    async def finish(
        self,
        run_id: str,
        attempt: int,
        state: RunState,
        *,
        error: str | None = None,
        result: Mapping[str, Any] | None = None,
    ) -> None:
        """End a run and release its cartridge name. May be repeated until it returns. Raises Fenced."""
        if not state.over:
            raise InvalidArgument(f"a run can't end as {state}", field="state")
        values = dict(result) if result is not None else None
        event = {"type": "finished", "state": state, "error": error, "result": values}
        await self._held(
            "runs/finish",
            run_id,
            attempt,
            state,
            json.dumps(error),
            json.dumps(values),
            json.dumps(event),
            self._events_length,
        )
        events: list[tuple[str, dict[str, Any]]] = []
        after = "0-0"
        while page := await self._read_events(run_id, after, block=False):
            after = page[-1][0]
            events += [(event_id, each) for event_id, each in page if each is not None]
        final = FinalState(state=state.value, error=error, result=values, finished_ms=time.time_ns() // 10**6)
        await self._archive.finish(run_id, final, events)

    async def save_checkpoint(self, run_id: str, attempt: int, step: int, parts: Iterable[Buffer]) -> str:
        """Keep the trainer's state and return its digest; on an error the previous stands. Raises Fenced, StoreFull."""
        await self._held("runs/check", run_id, attempt)
        return await self._checkpoints.save(run_id, attempt, step, parts)

    async def load_checkpoint(self, run_id: str) -> tuple[int, bytes] | None:
        """Step and bytes of the newest good checkpoint, if there is one. Raises DigestMismatch if all are damaged."""
        return await self._checkpoints.load(check_run(run_id, field="run_id"))

    async def traceparent(self, run_id: str) -> str:
        """Where the run was asked for, to link its steps' traces to; "" if nobody traced that."""
        return await self._archive.traceparent(check_run(run_id, field="run_id"))

    async def _read_events(self, run_id: str, after: str, *, block: bool) -> list[tuple[str, dict[str, Any] | None]]:
        """None in the place of one that can't be read."""
        stream = key("run-events", run_id)
        events: list[tuple[str, dict[str, Any] | None]] = []
        for event_id, fields in await self._connection.read_stream(stream, after, block=block):
            event = None
            with skipped("run", f"{stream} {event_id}"), reading(f"event {event_id} of run {run_id}"):
                event = parse_object(fields["event"])
            events.append((event_id, event))
        return events

    async def _held(self, script: str, run_id: str, attempt: int, *args: str | int) -> Reply:
        reply = await self._connection.run(script, run_id, attempt, *args)
        if reply[0] == "missing":
            raise Fenced(f"attempt {attempt} does not hold run {run_id}: there is no such run, or not any more")
        if reply[0] == "fenced":
            raise Fenced(f"attempt {attempt} does not hold run {run_id}: it is {reply[2]}, attempt {reply[1]}")
        return reply

    async def _run(self, script: str, *args: str | int) -> Reply:
        reply = await self._connection.run(script, *args)
        if reply[0] == "missing":
            raise RunNotFound(f"there is no run {args[0]}", field="run_id")
        return reply


def _desired(text: str) -> Desired:
    with reading("what is wanted of a run in Redis"):
        return desired_of(text)


def to_ms(seconds: float) -> int:
    return max(1, int(seconds * 1000))
