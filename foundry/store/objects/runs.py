"""Durable truth about runs. All but `desired.json` is written once, so that no late writer can undo a newer one."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass
from typing import Any

import structlog

from foundry.errors import DigestMismatch, InvalidArgument, NotFound, RunNotFound
from foundry.store.objects import layout
from foundry.store.objects.objects import Objects
from foundry.store.sealed import seal, unseal

log = structlog.get_logger(__name__)

_MAX_READS = 16


@dataclass(frozen=True, slots=True)
class ArchivedRun:
    """`final` is None while the run is not over."""

    run_id: str
    spec: str
    name: str
    created_ms: int
    attempt: int
    desired: str
    final: FinalState | None


@dataclass(frozen=True, slots=True)
class FinalState:
    state: str
    error: str | None
    result: dict[str, Any] | None
    finished_ms: int


class RunArchive:
    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._reads = asyncio.Semaphore(_MAX_READS)

    async def create(self, run_id: str, *, spec: str, name: str, created_ms: int, traceparent: str = "") -> None:
        values = {"spec": spec, "name": name, "created_ms": created_ms}
        content = seal(values | {"traceparent": traceparent} if traceparent else values)
        await self._objects.put_if_absent(layout.run_record(run_id, "run.json"), content.encode())

    async def traceparent(self, run_id: str) -> str:
        """Of the request that made the run; "" if it was not traced. Raises NotFound, DigestMismatch."""
        return str((await self._record(layout.run_record(run_id, "run.json"))).get("traceparent", ""))

    async def forget(self, run_id: str) -> None:
        """Undo `create`."""
        await self._objects.delete(layout.run_record(run_id, "run.json"))

    async def begin_attempt(self, run_id: str, attempt: int) -> bool:
        """False if it had begun before."""
        return await self._objects.put_if_absent(layout.attempt(run_id, attempt), b"")

    async def desire(self, run_id: str, desired: str) -> None:
        await self._objects.put(layout.run_record(run_id, "desired.json"), [seal({"desired": desired}).encode()])

    async def finish(self, run_id: str, final: FinalState, events: list[tuple[str, dict[str, Any]]]) -> None:
        lines = "".join(json.dumps({"id": event_id, "event": event}) + "\n" for event_id, event in events)
        await self._objects.put_if_absent(layout.run_record(run_id, "events.jsonl"), lines.encode())
        await self._objects.put_if_absent(layout.run_record(run_id, "result.json"), seal(asdict(final)).encode())

    async def events(self, run_id: str) -> list[tuple[str, dict[str, Any]]]:
        """What happened in a run that is over; nothing for any other. Raises DigestMismatch if it is damaged."""
        try:
            lines = bytes(await self._objects.get(layout.run_record(run_id, "events.jsonl"))).decode().splitlines()
        except NotFound:
            return []
        try:
            return [(entry["id"], entry["event"]) for entry in map(json.loads, lines)]
        except (ValueError, KeyError, TypeError) as error:
            raise DigestMismatch(f"the events of run {run_id} are damaged: {error!r}") from error

    async def runs(self) -> list[ArchivedRun]:
        """All runs that can be read, oldest first: a damaged one must not take the others with it."""
        # One listing tells which of the small objects exist.
        keys = set(await self._objects.keys(layout.RUNS))
        found = [match["run"] for key in keys if (match := layout.RUN.fullmatch(key))]
        runs = await asyncio.gather(*(self._read_if_whole(run_id, keys) for run_id in found))
        return sorted((run for run in runs if run), key=lambda run: (run.created_ms, run.run_id))

    async def run(self, run_id: str) -> ArchivedRun:
        """Raises RunNotFound, DigestMismatch if what is kept of it is damaged."""
        keys = set(await self._objects.keys(layout.run(run_id)))
        if layout.run_record(run_id, "run.json") not in keys:
            raise RunNotFound(f"there is no run {run_id}", field="run_id")
        return await self._read(run_id, keys)

    async def _read_if_whole(self, run_id: str, keys: set[str]) -> ArchivedRun | None:
        try:
            return await self._read(run_id, keys)
        except DigestMismatch as error:
            log.error("run_unreadable", run=run_id, error=error.message)
        except NotFound:
            pass  # forgotten since it was listed
        return None

    async def _read(self, run_id: str, keys: set[str]) -> ArchivedRun:
        begun = await self._record(layout.run_record(run_id, "run.json"))
        desired, final = "", None
        if (key := layout.run_record(run_id, "desired.json")) in keys:
            desired = (await self._record(key))["desired"]
        if (key := layout.run_record(run_id, "result.json")) in keys:
            final = FinalState(**await self._record(key))
        attempts = [int(key.rpartition("/")[2]) for key in keys if key.startswith(layout.attempts(run_id))]
        return ArchivedRun(
            run_id=run_id,
            spec=begun["spec"],
            name=begun["name"],
            created_ms=begun["created_ms"],
            attempt=max(attempts, default=0),
            desired=desired,
            final=final,
        )

    async def _record(self, key: str) -> dict[str, Any]:
        async with self._reads:
            try:
                return await self._objects.parsed(key, lambda content: unseal(content, key))
            except InvalidArgument as error:
                raise DigestMismatch(error.message) from error
