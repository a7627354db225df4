"""Training runs: records, the queue that workers take them from, and what workers say about them.

A worker claims a run under a lease; each claim counts `attempt` up, and that number is the fencing token in everything
that the worker does. A worker that stops sending heartbeats loses the run to the next one that asks.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import suppress
from typing import Any

from foundry.errors import Conflict, Fenced, FoundryError, InvalidArgument, RunNotFound, RunOver, StoreUnavailable
from foundry.identity import Buffer
from foundry.store.names import check_run
from foundry.store.objects.checkpoints import Checkpoints
from foundry.store.objects.objects import Objects
from foundry.store.objects.runs import FinalState, RunArchive
from foundry.store.record import (
    ActiveRuns,
    ClaimedRun,
    Desired,
    RunRecord,
    RunState,
    archived_record,
    desired_of,
    record_of,
)
from foundry.store.redis import run_scripts as scripts
from foundry.store.redis.connection import Connection, Reply
from foundry.store.settings import StoreSettings
from foundry.store.spec import RunSpec
from foundry.telemetry.traces import current_traceparent

__all__ = ["ActiveRuns", "ClaimedRun", "Desired", "RunRecord", "RunSpec", "RunState", "RunStore"]

MAX_EVENT_BYTES = 64 * 2**10
# Between two looks at a run that another worker holds or that is paused.
_SECONDS_BETWEEN_CLAIMS = 1.0
# Lower-case base32: no letter that reads like a digit.
_ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"


class RunStore:
    """All methods raise StoreUnavailable when Redis or the object storage can't be reached."""

    def __init__(self, connection: Connection, objects: Objects, settings: StoreSettings) -> None:
        self._connection = connection
        self._archive = RunArchive(objects)
        self._checkpoints = Checkpoints(objects)
        self._settings = settings

    # For people

    async def create(self, spec: RunSpec) -> str:
        """Queue a run and return its id, such as `run-k3v7q2xa`."""
        run_id = "run-" + "".join(secrets.choice(_ID_ALPHABET) for _ in range(8))
        # Asked first, so that a run is not left in object storage, to start later, for a caller who was refused.
        await self._connection.read("EXISTS", f"foundry:run:{run_id}")
        await self._archive.create(
            run_id,
            spec=spec.to_json(),
            name=spec.name,
            created_ms=time.time_ns() // 10**6,
            traceparent=current_traceparent(),
        )
        try:
            await self._run(scripts.ENQUEUE, run_id, spec.to_json(), spec.name, self._events_length)
        except FoundryError:
            await self._archive.forget(run_id)
            raise
        return run_id

    async def get(self, run_id: str) -> RunRecord:
        """Raises RunNotFound. Without Redis, what object storage knows."""
        check_run(run_id, field="run_id")
        try:
            fields = await self._connection.read("HGETALL", f"foundry:run:{run_id}")
        except StoreUnavailable:
            return archived_record(await self._archive.run(run_id))
        if not fields:
            raise RunNotFound(f"there is no run {run_id}", field="run_id")
        return record_of(run_id, dict(zip(fields[::2], fields[1::2], strict=True)))

    async def request_cancel(self, run_id: str) -> None:
        """The worker ends the run at its next heartbeat; a run that nobody works on ends now.

        Raises RunNotFound, and Conflict if the run is over in another way.
        """
        reply = await self._request(run_id, "cancel")
        if reply[0] == "unheld":
            await self.finish(run_id, int(reply[1]), RunState.CANCELLED)

    async def request_pause(self, run_id: str) -> None:
        """Raises RunNotFound, Conflict if the run is over or being cancelled."""
        await self._request(run_id, "pause")

    async def request_resume(self, run_id: str) -> None:
        """Raises RunNotFound, Conflict if the run is over or being cancelled."""
        await self._request(run_id, "resume")

    async def _request(self, run_id: str, wish: str) -> Reply:
        reply = await self._run(scripts.REQUEST, check_run(run_id, field="run_id"), wish, self._events_length)
        if reply[0] == "over" and not (wish == "cancel" and reply[1] == RunState.CANCELLED):
            raise Conflict(f"run {run_id} has {reply[1]} already", field="run_id")
        if reply[0] == "conflict":
            raise Conflict(f"run {run_id} is being cancelled", field="run_id")
        if reply[0] in ("ok", "unheld"):
            await self._archive.desire(run_id, "" if wish == "resume" else wish)
        return reply

    async def events(self, run_id: str, after: str = "0-0") -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """What happens in a run, from after the event `after`, as (id, event); ends after the event of type `finished`.

        Other types: `state` (state, attempt, waiting_for) and whatever workers report. Raises RunNotFound,
        StoreUnavailable; ask again with the last id.
        """
        while True:
            over = (await self.get(run_id)).state.over
            entries = await self._read_events(run_id, after, block=not over)
            for event_id, event in entries:
                after = event_id
                yield event_id, event
                if event.get("type") == "finished":
                    return
            if over and not entries:
                break
        # It ended long ago, or before Redis was last emptied: the archive has what happened.
        for event_id, event in await self._archive.events(run_id):
            if _position(event_id) > _position(after):
                yield event_id, event

    async def _read_events(self, run_id: str, after: str, *, block: bool) -> list[tuple[str, dict[str, Any]]]:
        entries = await self._connection.read_stream(f"foundry:run-events:{run_id}", after, block=block)
        return [(event_id, json.loads(fields["event"])) for event_id, fields in entries]

    # For workers

    async def claim(self, worker: str, lease_seconds: float, *, timeout_seconds: float = 0.0) -> ClaimedRun | None:
        """Take up a run: one whose worker went silent, else the longest queued; None if none in `timeout_seconds`."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            reply = await self._run(scripts.CLAIM, worker, _ms(lease_seconds), self._events_length)
            if reply[0] == "ok":
                if claimed := await self._begin(reply):
                    return claimed
                continue
            wait = deadline - time.monotonic()
            if wait <= 0:
                return None
            if int(reply[1]) >= 0:
                wait = min(wait, int(reply[1]) / 1000)
            await self._connection.wait_for_token("foundry:runs:bell", wait)

    async def claim_run(
        self, run_id: str, worker: str, lease_seconds: float, *, timeout_seconds: float = 0.0
    ) -> ClaimedRun | None:
        """Take up this run; None if for `timeout_seconds` another worker holds it or it is paused.

        Raises RunNotFound, RunOver.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            reply = await self._run(
                scripts.CLAIM_RUN, check_run(run_id, field="run_id"), worker, _ms(lease_seconds), self._events_length
            )
            if reply[0] == "over":
                raise RunOver(f"run {run_id} has {reply[1]} already", field="run_id")
            if reply[0] == "ok":
                if claimed := await self._begin(reply):
                    return claimed
                continue
            wait = min(deadline - time.monotonic(), _SECONDS_BETWEEN_CLAIMS)
            if wait <= 0:
                return None
            if int(reply[1]) >= 0:
                wait = min(wait, int(reply[1]) / 1000)
            # The bell would be taken from a worker that takes any run.
            await asyncio.sleep(wait)

    async def _begin(self, reply: Reply) -> ClaimedRun | None:
        """What was claimed; None if it has to be claimed again, or is now over."""
        run_id, attempt, desired = reply[1], int(reply[2]), desired_of(reply[4])
        # Before the worker acts: an attempt that did anything must not be forgotten with Redis.
        if not await self._archive.begin_attempt(run_id, attempt):
            # Redis forgot that it gave this attempt out, perhaps to a worker that still acts on it: the next.
            with suppress(Fenced):
                await self.requeue(run_id, attempt)
        elif desired is Desired.CANCEL:
            await self.finish(run_id, attempt, RunState.CANCELLED)
        else:
            return ClaimedRun(run_id=run_id, attempt=attempt, spec=RunSpec.from_json(reply[3]), desired=desired)
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
        """Extend the lease, say how it stands (running, paused or waiting) and learn what is wanted.

        Raises Fenced if the run is over or another attempt holds it: stop at once.
        """
        if state.over or state is RunState.QUEUED:
            raise InvalidArgument(f"a worker can't be {state}", field="state")
        reply = await self._held(
            scripts.HEARTBEAT, run_id, attempt, _ms(lease_seconds), state, waiting_for, self._events_length
        )
        return desired_of(reply[1])

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
        return str((await self._held(scripts.REPORT, run_id, attempt, text, self._events_length))[1])

    async def requeue(self, run_id: str, attempt: int, *, result: Mapping[str, Any] | None = None) -> None:
        """Give a run back unfinished, so that another worker takes it at once; one that is to be cancelled ends so,
        with `result`. Raises Fenced."""
        if (await self._held(scripts.REQUEUE, run_id, attempt, self._events_length))[0] == "cancel":
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
            scripts.FINISH,
            run_id,
            attempt,
            state,
            json.dumps(error),
            json.dumps(values),
            json.dumps(event),
            self._events_length,
        )
        events: list[tuple[str, dict[str, Any]]] = []
        while page := await self._read_events(run_id, events[-1][0] if events else "0-0", block=False):
            events += page
        await self._archive.finish(run_id, FinalState(state, error, values, time.time_ns() // 10**6), events)

    async def save_checkpoint(self, run_id: str, attempt: int, step: int, parts: Iterable[Buffer]) -> str:
        """Keep the trainer's state and return its digest; on an error the previous stands. Raises Fenced, StoreFull."""
        await self._held(scripts.CHECK, run_id, attempt)
        return await self._checkpoints.save(run_id, attempt, step, parts)

    async def load_checkpoint(self, run_id: str) -> tuple[int, bytes] | None:
        """Step and bytes of the newest good checkpoint, if there is one. Raises DigestMismatch if all are damaged."""
        return await self._checkpoints.load(check_run(run_id, field="run_id"))

    async def traceparent(self, run_id: str) -> str:
        """Where the run was asked for, to link its steps' traces to; "" if nobody traced that."""
        return await self._archive.traceparent(check_run(run_id, field="run_id"))

    # For who starts workers

    async def active(self) -> ActiveRuns:
        """All runs that are not over, but for paused ones that nobody holds. Does not know them without Redis."""
        _, held, waiting = await self._run(scripts.ACTIVE)
        return ActiveRuns(frozenset(held), frozenset(waiting))

    async def explain_queued(self, run_id: str, waiting_for: str) -> None:
        """Say what a run in the queue waits for; without effect once a worker has it."""
        await self._run(scripts.EXPLAIN_QUEUED, check_run(run_id, field="run_id"), waiting_for, self._events_length)

    # For rebuild

    async def restore(self, server_run: str) -> int:
        """Put all runs back into the Redis of that run id; returns how many are not over."""
        runs = await self._archive.runs()
        for run in runs:
            final = run.final
            await self._connection.run_restoring(
                scripts.RESTORE,
                server_run,
                run.run_id,
                run.spec,
                run.name,
                run.created_ms,
                run.attempt,
                run.desired,
                _ms(self._settings.recovery_lease_seconds),
                final.state if final else "",
                json.dumps(final.error if final else None),
                json.dumps(final.result if final else None),
                final.finished_ms if final else "",
            )
        return sum(run.final is None for run in runs)

    @property
    def _events_length(self) -> int:
        return self._settings.event_stream_length

    async def _held(self, script: str, run_id: str, attempt: int, *args: str | int) -> Reply:
        reply = await self._run(script, run_id, attempt, *args)
        if reply[0] == "fenced":
            raise Fenced(f"attempt {attempt} does not hold run {run_id}: it is {reply[2]}, attempt {reply[1]}")
        return reply

    async def _run(self, script: str, *args: str | int) -> Reply:
        reply = await self._connection.run(script, *args)
        if reply[0] == "missing":
            raise RunNotFound(f"there is no run {args[0]}", field="run_id")
        return reply

    # Beside checkpoints, which name it by its digest

    async def save_curriculum(self, run_id: str, attempt: int, content: bytes) -> str:
        """Keep what the run asks, once for all its checkpoints; returns its digest. Raises Fenced, StoreFull."""
        await self._held(scripts.CHECK, run_id, attempt)
        return await self._checkpoints.save_curriculum(run_id, content)

    async def load_curriculum(self, run_id: str, digest: str) -> bytes:
        """Raises DigestMismatch if it is gone or damaged."""
        return await self._checkpoints.load_curriculum(check_run(run_id, field="run_id"), digest)

    # Last, because after it `list` means this method.
    async def list(self) -> list[RunRecord]:
        """All runs, newest first. Without Redis, what object storage knows."""
        try:
            run_ids = await self._connection.read("ZREVRANGE", "foundry:runs", 0, -1)
        except StoreUnavailable:
            return [archived_record(run) for run in reversed(await self._archive.runs())]
        return [await self.get(run_id) for run_id in run_ids]


def _ms(seconds: float) -> int:
    return max(1, int(seconds * 1000))


def _position(event_id: str) -> tuple[int, int]:
    ms, _, sequence = event_id.partition("-")
    return int(ms), int(sequence or 0)
