"""Training runs as people see them: asked for, looked at, paused, cancelled. What workers do with them: queue.py"""

from __future__ import annotations

import builtins
import json
import secrets
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

from foundry.errors import (
    Conflict,
    DigestMismatch,
    FoundryError,
    InvalidArgument,
    ResourceExhausted,
    RunNotFound,
    StoreUnavailable,
)
from foundry.store.names import check_new_name, check_run, check_tenant_of
from foundry.store.paging import Page, cut
from foundry.store.queue import RunQueue, to_ms
from foundry.store.record import (
    ActiveRuns,
    RunRecord,
    RunState,
    archived_record,
    record_of,
)
from foundry.store.redis.connection import RESTORE, Reply
from foundry.store.redis.keys import key
from foundry.store.spec import RunSpec
from foundry.store.unreadable import skipped
from foundry.telemetry.traces import current_traceparent
from foundry.tenants import check_tenant

# Lower-case base32: no letter that reads like a digit.
_ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"


class RunStore(RunQueue):
    """All that is done with runs: this and `RunQueue`."""

    async def create(self, spec: RunSpec, *, tenant: str = "", most_open: int | None = None) -> str:
        """Queue a run that uses the documents of `tenant`, and return its id, such as `run-k3v7q2xa`.

        Raises InvalidArgument unless a new cartridge may have the name and it is the tenant's; a run of "" may have any
        tenant's. Raises ResourceExhausted if `most_open` runs of the tenant are not over.
        """
        check_tenant_of(tenant, check_new_name(spec.name))
        run_id = "run-" + "".join(secrets.choice(_ID_ALPHABET) for _ in range(8))
        # Asked first, so that a run is not left in object storage, to start later, for a caller who was refused.
        await self._connection.read("EXISTS", key("run", run_id))
        await self._archive.create(
            run_id,
            spec=spec.to_json(),
            name=spec.name,
            tenant=tenant,
            created_ms=time.time_ns() // 10**6,
            traceparent=current_traceparent(),
        )
        try:
            most = "" if most_open is None else most_open
            reply = await self._run(
                "runs/enqueue", run_id, spec.to_json(), spec.name, tenant, self._events_length, most
            )
            if reply[0] == "full":
                raise _too_many(int(reply[1]))
        except FoundryError:
            await self._archive.forget(run_id)
            raise
        return run_id

    async def check_open(self, tenant: str, most_open: int) -> None:
        """Raises ResourceExhausted as `create` would now."""
        if (num_open := int((await self._run("runs/open", tenant))[1])) >= most_open:
            raise _too_many(num_open)

    async def get(self, run_id: str, *, tenant: str | None = None) -> RunRecord:
        """Raises RunNotFound, also for another tenant's than `tenant`, if that is given. Without Redis, what object
        storage knows."""
        record = await self._get(check_run(run_id, field="run_id"))
        if tenant not in (None, record.tenant):
            raise _not_found(run_id)
        return record

    async def _get(self, run_id: str) -> RunRecord:
        try:
            fields = await self._connection.read("HGETALL", key("run", run_id))
        except StoreUnavailable:
            return archived_record(await self._archive.run(run_id))
        if not fields or "deleted" in fields[::2]:
            raise _not_found(run_id)
        return record_of(run_id, dict(zip(fields[::2], fields[1::2], strict=True)))

    async def needing(self, digest: str, tenant: str) -> str | None:
        """A run of the tenant that is not over and names the document, if there is one. Raises DigestMismatch if a run
        can't be read."""
        reply = await self._connection.read("HGETALL", key("open-runs"))
        for run_id, owner in zip(reply[::2], reply[1::2], strict=True):
            # Gone is what was deleted since it was listed.
            with suppress(RunNotFound):
                if owner == tenant and digest in (await self._get(run_id)).spec.texts:
                    return str(run_id)
        return None

    async def ids(self, tenant: str | None = None) -> builtins.list[str]:
        """Ids of all runs that Redis knows, or of a tenant's, newest first."""
        return [str(run_id) for run_id in await self._connection.read("ZREVRANGE", _index(tenant), 0, -1)]

    async def listed(self, run_id: str, tenant: str | None = None) -> RunRecord:
        """A run that Redis lists, among a tenant's if that is given. Raises DigestMismatch if there is none of that id,
        or it is another tenant's."""
        try:
            return await self.get(run_id, tenant=tenant)
        except (RunNotFound, InvalidArgument) as error:
            raise DigestMismatch(f"{_index(tenant)} in Redis is damaged: {error.message}. {RESTORE}") from error

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

    async def delete(self, run_id: str, *, tenant: str | None = None) -> None:
        """Delete a run that is over, with its events and checkpoints; the versions that it published stay.

        Raises RunNotFound, also for another tenant's than `tenant`, if that is given; Conflict if it is not over.
        """
        asked = key("run", check_run(run_id, field="run_id"))
        # Not all of it: what is damaged can be deleted too.
        state, of_tenant = await self._connection.read("HMGET", asked, "state", "tenant")
        if not state or tenant not in (None, of_tenant or ""):
            raise _not_found(run_id)
        if state not in {each.value for each in RunState if each.over}:
            raise Conflict(f"run {run_id} is {state}: cancel it before it is deleted", field="run_id")
        await self.drop(run_id)

    async def drop(self, run_id: str) -> None:
        """Delete a run that is known to be over. May be repeated."""
        # First what makes it a run, or a loss of Redis after a crash would bring it back, and without its result queue
        # it again. Until it has left Redis too it is shown and can be deleted once more. What a crash leaves behind
        # that, or a worker writes that was replaced, is no run's: `gc` takes it. A run that is over stays so, so that
        # nobody takes it up meanwhile.
        await self._archive.forget(run_id)
        await self._run("runs/delete", run_id)
        await self._archive.clear(run_id)

    async def _request(self, run_id: str, wish: str) -> Reply:
        reply = await self._run("runs/request", check_run(run_id, field="run_id"), wish, self._events_length)
        if reply[0] == "over" and not (wish == "cancel" and reply[1] == RunState.CANCELLED):
            raise Conflict(f"run {run_id} has {reply[1]} already", field="run_id")
        if reply[0] == "conflict":
            raise Conflict(f"run {run_id} is being cancelled", field="run_id")
        if reply[0] in ("ok", "unheld"):
            await self._archive.desire(run_id, "" if wish == "resume" else wish)
        return reply

    async def events(
        self, run_id: str, after: str = "0-0", *, follow: bool = True
    ) -> AsyncGenerator[tuple[str, dict[str, Any]]]:
        """What happens in a run, from after the event `after`, as (id, event); ends after the event of type `finished`,
        and without `follow` after the newest.

        Other types: `state` (state, attempt, waiting_for) and whatever workers report. Raises RunNotFound,
        StoreUnavailable; ask again with the last id.
        """
        while True:
            over = (await self.get(run_id)).state.over
            entries = await self._read_events(run_id, after, block=follow and not over)
            for event_id, event in entries:
                after = event_id
                if event is None:
                    continue
                yield event_id, event
                if event.get("type") == "finished":
                    return
            if not entries and over:
                break
            if not entries and not follow:
                return
        # It ended long ago, or before Redis was last emptied: the archive has what happened.
        for event_id, event in await self._archive.events(run_id):
            if _position(event_id) > _position(after):
                yield event_id, event

    async def nothing_after(self, run_id: str, after: str) -> bool:
        """Whether the run is over and no event of it follows `after`. Raises as `events` does."""
        if not (await self.get(run_id)).state.over:
            return False
        async with aclosing(self.events(run_id, after)) as events:
            return await anext(events, None) is None

    # For who starts workers

    async def active(self) -> ActiveRuns:
        """All runs that are not over, but for paused ones that nobody holds. Does not know them without Redis."""
        _, held, waiting = await self._run("runs/active")
        return ActiveRuns(frozenset(held), frozenset(waiting))

    async def explain_queued(self, run_id: str, waiting_for: str) -> None:
        """Say what a run in the queue waits for; without effect once a worker has it."""
        await self._run("runs/explain_queued", check_run(run_id, field="run_id"), waiting_for, self._events_length)

    # For upkeep

    async def asked(self, run_id: str) -> tuple[str, RunSpec]:
        """Tenant and what was asked for, as object storage has it. Raises NotFound, DigestMismatch."""
        return await self._archive.asked(run_id)

    async def check(self, run_id: str) -> int:
        """Bytes that were hashed of what object storage has of a run. Raises RunNotFound, DigestMismatch."""
        await self._archive.run(run_id)
        await self._archive.events(run_id)
        return 0

    async def restore(self, token: str) -> int:
        """Put all runs back into Redis, and no others, in the rebuild of that token; returns how many are not over."""
        kept = json.dumps(dict.fromkeys(await self._archive.ids(), True))
        await self._connection.run_restoring("runs/keep", token, kept)
        runs = await self._archive.runs()
        for run in runs:
            final = run.final
            with skipped("run", key("run", run.run_id)):
                await self._connection.run_restoring(
                    "runs/restore",
                    token,
                    run.run_id,
                    run.spec,
                    run.name,
                    run.tenant,
                    run.created_ms,
                    run.attempt,
                    run.desired,
                    to_ms(self._settings.recovery_lease_seconds),
                    final.state if final else "",
                    json.dumps(final.error if final else None),
                    json.dumps(final.result if final else None),
                    final.finished_ms if final else "",
                )
        return sum(run.final is None for run in runs)

    # Last, because after it `list` means this method.
    async def list(self, *, tenant: str | None = None) -> list[RunRecord]:
        """All runs that can be read, or a tenant's, newest first. Without Redis' list of them, what object storage
        knows."""
        return (await self.page(limit=sys.maxsize, tenant=tenant)).items

    async def page(self, *, after: str = "", limit: int, tenant: str | None = None) -> Page[RunRecord]:
        """Some of them, behind the run `after`. Raises InvalidArgument."""
        run_ids = None
        with suppress(StoreUnavailable), skipped("run", _index(tenant)):
            run_ids = await self.ids(tenant)
        if run_ids is None:
            runs = reversed(await self._archive.runs())
            archived = {run.run_id: run for run in runs if tenant in (None, run.tenant)}
            some, next_after = cut(list(archived), after, limit)
            return Page([archived_record(archived[run_id]) for run_id in some], next_after)
        some, next_after = cut(run_ids, after, limit)
        records = []
        for run_id in some:
            with skipped("run", key("run", run_id)):
                records.append(await self.listed(run_id, tenant))
        return Page(records, next_after)


def _index(tenant: str | None) -> str:
    return key("runs") if tenant is None else key("tenant-runs", check_tenant(tenant))


def _not_found(run_id: str) -> RunNotFound:
    return RunNotFound(f"there is no run {run_id}", field="run_id")


def _too_many(num_open: int) -> ResourceExhausted:
    return ResourceExhausted(
        f"{num_open} runs are not over, and no more may be at one time: wait until one of them is, or cancel it"
    )


def _position(event_id: str) -> tuple[int, int]:
    ms, _, sequence = event_id.partition("-")
    return int(ms), int(sequence or 0)
