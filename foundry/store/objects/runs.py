"""Durable truth about runs. All but `desired.json` is written once, so that no late writer can undo a newer one."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from foundry.errors import InvalidArgument, NotFound, RunNotFound
from foundry.store.names import check_tenant_of
from foundry.store.objects import layout
from foundry.store.objects.objects import Objects
from foundry.store.sealed import seal, unseal
from foundry.store.spec import RunSpec
from foundry.store.unreadable import skipped
from foundry.untrusted import parse_object
from foundry.validation import Checked

# Those of 10,000 events of 64 KiB each.
MAX_EVENTS_BYTES = 2**30
_EVENT_ID = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")

# Until the year 9999, the last that times have.
Milliseconds = Annotated[int, Field(ge=0, lt=253_402_300_800_000)]


@dataclass(frozen=True, slots=True)
class ArchivedRun:
    """`final` is None while the run is not over."""

    run_id: str
    spec: str
    name: str
    tenant: str
    created_ms: int
    attempt: int
    desired: str
    final: FinalState | None


class FinalState(Checked):
    state: str = Field(pattern=r"\A(succeeded|failed|cancelled)\z")
    error: str | None
    result: dict[str, Any] | None
    finished_ms: Milliseconds


class _Begun(Checked):
    spec: str
    name: str
    created_ms: Milliseconds
    tenant: str = ""
    traceparent: str = ""


class _Desired(Checked):
    desired: Literal["pause", "cancel", ""]


class RunArchive:
    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    async def create(
        self, run_id: str, *, spec: str, name: str, created_ms: int, tenant: str = "", traceparent: str = ""
    ) -> None:
        # What is not said is left out: releases that don't know it read the record.
        more = {key: value for key, value in (("tenant", tenant), ("traceparent", traceparent)) if value}
        content = seal({"spec": spec, "name": name, "created_ms": created_ms, **more})
        await self._objects.put_if_absent(layout.run_record(run_id, "run.json"), content.encode())

    async def traceparent(self, run_id: str) -> str:
        """Of the request that made the run; "" if it was not traced. Raises NotFound, DigestMismatch."""
        return (await self._objects.record(layout.run_record(run_id, "run.json"), _begun)).traceparent

    async def asked(self, run_id: str) -> tuple[str, RunSpec]:
        """Tenant and what was asked for. Raises NotFound, DigestMismatch."""
        begun = await self._objects.record(layout.run_record(run_id, "run.json"), _begun)
        return begun.tenant, RunSpec.from_json(begun.spec)

    async def forget(self, run_id: str) -> None:
        """Undo `create`: what is left of the run is none."""
        await self._objects.delete(layout.run_record(run_id, "run.json"))

    async def clear(self, run_id: str) -> None:
        """Delete all that is left of a run, its checkpoints too."""
        for key in await self._objects.keys(layout.run(run_id)):
            await self._objects.delete(key)

    async def begin_attempt(self, run_id: str, attempt: int) -> bool:
        """False if it had begun before."""
        return await self._objects.put_if_absent(layout.attempt(run_id, attempt), b"")

    async def desire(self, run_id: str, desired: str) -> None:
        await self._objects.put(layout.run_record(run_id, "desired.json"), [seal({"desired": desired}).encode()])

    async def finish(self, run_id: str, final: FinalState, events: list[tuple[str, dict[str, Any]]]) -> None:
        lines = "".join(json.dumps({"id": event_id, "event": event}) + "\n" for event_id, event in events)
        await self._objects.put_if_absent(layout.run_record(run_id, "events.jsonl"), lines.encode())
        await self._objects.put_if_absent(layout.run_record(run_id, "result.json"), seal(final.model_dump()).encode())

    async def events(self, run_id: str) -> list[tuple[str, dict[str, Any]]]:
        """What happened in a run that is over; nothing for any other. Raises DigestMismatch if it is damaged."""
        with suppress(NotFound):
            key = layout.run_record(run_id, "events.jsonl")
            return await self._objects.record(key, _events, max_bytes=MAX_EVENTS_BYTES)
        return []

    async def ids(self) -> set[str]:
        """Those of all runs, also of those that can't be read."""
        return {
            match["run"] for key in await self._objects.keys(layout.RUNS) if (match := layout.RUN_RECORD.fullmatch(key))
        }

    async def runs(self) -> list[ArchivedRun]:
        """All runs that can be read, oldest first: a damaged one must not take the others with it."""
        # One listing tells which of the small objects exist.
        keys = set(await self._objects.keys(layout.RUNS))
        found = [match["run"] for key in keys if (match := layout.RUN_RECORD.fullmatch(key))]
        runs = await asyncio.gather(*(self._read_if_whole(run_id, keys) for run_id in found))
        return sorted((run for run in runs if run), key=lambda run: (run.created_ms, run.run_id))

    async def run(self, run_id: str) -> ArchivedRun:
        """Raises RunNotFound, DigestMismatch if what is kept of it is damaged."""
        keys = set(await self._objects.keys(layout.run(run_id)))
        if layout.run_record(run_id, "run.json") not in keys:
            raise RunNotFound(f"there is no run {run_id}", field="run_id")
        return await self._read(run_id, keys)

    async def _read_if_whole(self, run_id: str, keys: set[str]) -> ArchivedRun | None:
        # Gone is what was forgotten since it was listed.
        with suppress(NotFound), skipped("run", layout.run(run_id)):
            return await self._read(run_id, keys)
        return None

    async def _read(self, run_id: str, keys: set[str]) -> ArchivedRun:
        begun = await self._objects.record(layout.run_record(run_id, "run.json"), _begun)
        desired, final = "", None
        if (key := layout.run_record(run_id, "desired.json")) in keys:
            wish = await self._objects.record(key, lambda content: _Desired.model_validate(unseal(content)))
            desired = wish.desired
        if (key := layout.run_record(run_id, "result.json")) in keys:
            final = await self._objects.record(key, lambda content: FinalState.model_validate(unseal(content)))
        attempts = [
            int(match["attempt"])
            for key in keys
            if key.startswith(layout.attempts(run_id)) and (match := layout.ATTEMPT.fullmatch(key))
        ]
        return ArchivedRun(
            run_id=run_id,
            spec=begun.spec,
            name=begun.name,
            tenant=begun.tenant,
            created_ms=begun.created_ms,
            attempt=max(attempts, default=0),
            desired=desired,
            final=final,
        )


def _begun(content: bytes) -> _Begun:
    begun = _Begun.model_validate(unseal(content))
    if (name := RunSpec.from_json(begun.spec).name) != begun.name:
        raise InvalidArgument(f"it is of {begun.name}, its spec of {name}")
    check_tenant_of(begun.tenant, begun.name)
    return begun


def _events(content: bytes) -> list[tuple[str, dict[str, Any]]]:
    return [_event(line) for line in content.splitlines()]


def _event(line: bytes) -> tuple[str, dict[str, Any]]:
    entry = parse_object(line)
    event_id, event = entry["id"], entry["event"]
    if not (isinstance(event_id, str) and _EVENT_ID.fullmatch(event_id) and isinstance(event, dict)):
        raise InvalidArgument(f"no event: {entry!r:.100}")
    return event_id, event
