"""Batches of OpenAI's API: which requests are to be answered, and the answers as they come.

All but the lease is written once. A gateway works on a batch under a lease, as workers do on runs; each one counts
`attempt` up, and what an attempt writes has its number: one that lost its lease overwrites nothing. Its lease is in
object storage, so that a batch goes on without Redis.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, TypeVar

from foundry.errors import BatchNotFound, Fenced, InvalidArgument, NotFound
from foundry.store.files import new_id
from foundry.store.objects import layout
from foundry.store.objects.objects import Objects
from foundry.store.paging import Page, cut
from foundry.store.sealed import seal, unseal
from foundry.store.unreadable import skipped
from foundry.tenants import check_tenant
from foundry.untrusted import parse_object
from foundry.validation import Checked

R = TypeVar("R", bound=Checked)
Status = Literal["completed", "failed", "expired", "cancelled"]


class BatchRecord(Checked):
    """What was asked for. `client` is the key of who asked; times are Unix time in seconds."""

    batch_id: str
    tenant: str
    client: str
    endpoint: str
    input_file_id: str
    output_file_id: str
    error_file_id: str
    metadata: Mapping[str, str] | None
    created_at: int
    expires_at: int


class BatchBegun(Checked):
    at: int
    total: int


class BatchMoment(Checked):
    at: int


class BatchFinal(Checked):
    """`errors` say why none of it was begun: {code, message, param, line}."""

    status: Status
    at: int
    total: int = 0
    completed: int = 0
    failed: int = 0
    errors: Sequence[dict[str, Any]] = ()


class _Lease(Checked):
    holder: str
    attempt: int
    until_ms: int


@dataclass(frozen=True, slots=True)
class BatchState:
    """A batch as it stands; None is what has not happened."""

    record: BatchRecord
    begun: BatchBegun | None = None
    cancel: BatchMoment | None = None
    finalizing: BatchMoment | None = None
    final: BatchFinal | None = None
    # While it is not over: as far as is written.
    completed: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """The answer to one line of the input; `text` is a line of the output, or of the errors unless `completed`."""

    line: int
    completed: bool
    text: str


class BatchStore:
    """The batches of one tenant."""

    def __init__(self, objects: Objects, *, tenant: str = "") -> None:
        self._objects, self._tenant = objects, check_tenant(tenant)

    def of(self, tenant: str) -> Self:
        """Those of another tenant. Raises InvalidArgument unless it is spelt as one."""
        return type(self)(self._objects, tenant=tenant)

    async def create(
        self, *, client: str, endpoint: str, input_file_id: str, metadata: Mapping[str, str] | None, seconds: int
    ) -> BatchRecord:
        now = int(time.time())
        record = BatchRecord(
            batch_id=new_id("batch_"),
            tenant=self._tenant,
            client=client,
            endpoint=endpoint,
            input_file_id=input_file_id,
            output_file_id=new_id("file-"),
            error_file_id=new_id("file-"),
            metadata=metadata,
            created_at=now,
            expires_at=now + seconds,
        )
        await self._put_once(record.batch_id, "batch", record)
        return record

    async def get(self, batch_id: str) -> BatchState:
        """Raises BatchNotFound, DigestMismatch."""
        try:
            keys = await self._objects.keys(layout.batch(self._tenant, batch_id))
            record = await self._record(batch_id, "batch", BatchRecord)
        except (NotFound, InvalidArgument) as error:
            raise BatchNotFound(f"there is no batch {batch_id[:100]}", field="batch_id") from error
        parts = {match["part"] for key in keys if (match := layout.BATCH_PART.fullmatch(key))}
        counts = [match for key in keys if (match := layout.RESULTS.fullmatch(key))]

        async def part(name: str, kind: type[R]) -> R | None:
            return await self._record(batch_id, name, kind) if name in parts else None

        return BatchState(
            record,
            begun=await part("begun", BatchBegun),
            cancel=await part("cancel", BatchMoment),
            finalizing=await part("finalizing", BatchMoment),
            final=await part("result", BatchFinal),
            completed=sum(int(match["completed"]) for match in counts),
            failed=sum(int(match["failed"]) for match in counts),
        )

    async def page(self, *, after: str = "", limit: int) -> Page[BatchState]:
        """Newest first, behind the batch `after`. Raises InvalidArgument."""
        entries = [
            (entry.last_modified, match["id"])
            async for entry in self._objects.scan(layout.batches(self._tenant))
            if (match := layout.BATCH_PART.fullmatch(entry.key)) and match["part"] == "batch"
        ]
        ids, next_after = cut([batch_id for _, batch_id in sorted(entries, reverse=True)], after, limit)

        async def read(batch_id: str) -> list[BatchState]:
            with suppress(BatchNotFound), skipped("batch", batch_id):
                return [await self.get(batch_id)]
            return []

        found = await asyncio.gather(*map(read, ids))
        return Page([state for states in found for state in states], next_after)

    async def num_open(self) -> int:
        return len([batch_id for tenant, batch_id in await self.open() if tenant == self._tenant])

    async def open(self) -> list[tuple[str, str]]:
        """(tenant, batch) of all tenants' that are not over, oldest first."""
        created: dict[tuple[str, str], float] = {}
        over: set[tuple[str, str]] = set()
        async for entry in self._objects.scan(layout.BATCHES):
            if match := layout.BATCH_PART.fullmatch(entry.key):
                name = (match["owner"].removeprefix("-"), match["id"])
                if match["part"] == "batch":
                    created[name] = entry.last_modified.timestamp()
                elif match["part"] == "result":
                    over.add(name)
        return sorted(created.keys() - over, key=lambda name: (created[name], name))

    async def cancel(self, batch_id: str) -> None:
        """Say that it is to be cancelled."""
        await self._put_once(batch_id, "cancel", BatchMoment(at=int(time.time())))

    async def is_cancelled(self, batch_id: str) -> bool:
        return await self._objects.exists(layout.batch_record(self._tenant, batch_id, "cancel"))

    # What the gateway does that works on it

    async def claim(self, batch_id: str, holder: str, lease_seconds: float) -> int | None:
        """The attempt that `holder` now has; None if another works on it."""
        key = layout.batch_record(self._tenant, batch_id, "lease")
        try:
            etag = (await self._objects.head(key)).etag
            lease = await self._record(batch_id, "lease", _Lease)
        except NotFound:
            first = self._lease(holder, 1, lease_seconds)
            return 1 if await self._objects.put_if_absent(key, first) else None
        if lease.until_ms > time.time() * 1000:
            return None
        attempt = lease.attempt + 1
        taken = await self._objects.put_if_match(key, self._lease(holder, attempt, lease_seconds), etag)
        return attempt if taken else None

    async def extend(self, batch_id: str, holder: str, attempt: int, lease_seconds: float) -> None:
        """Keep the lease; 0 seconds gives it back. Raises Fenced if another has it."""
        key = layout.batch_record(self._tenant, batch_id, "lease")
        etag = (await self._objects.head(key)).etag
        lease = await self._record(batch_id, "lease", _Lease)
        if (lease.holder, lease.attempt) != (holder, attempt):
            raise Fenced(f"attempt {attempt} does not hold batch {batch_id}: it is attempt {lease.attempt}")
        if not await self._objects.put_if_match(key, self._lease(holder, attempt, lease_seconds), etag):
            raise Fenced(f"attempt {attempt} does not hold batch {batch_id} any more")

    async def begin(self, batch_id: str, total: int) -> None:
        await self._put_once(batch_id, "begun", BatchBegun(at=int(time.time()), total=total))

    async def append(self, batch_id: str, attempt: int, number: int, rows: Sequence[Row]) -> None:
        """The `number`th piece of what an attempt answered."""
        completed = sum(row.completed for row in rows)
        key = layout.batch_results(self._tenant, batch_id, attempt, number, completed, len(rows) - completed)
        lines = [json.dumps({"line": row.line, "completed": row.completed, "text": row.text}) for row in rows]
        await self._objects.put(key, ["".join(f"{line}\n" for line in lines).encode()])

    async def rows(self, batch_id: str) -> AsyncIterator[list[Row]]:
        """What is answered, a piece at a time, each line once."""
        seen: set[int] = set()
        for key in await self._objects.keys(f"{layout.batch(self._tenant, batch_id)}/results"):
            if layout.RESULTS.fullmatch(key):
                rows = await self._objects.record(key, _rows)
                new = {row.line: row for row in rows if row.line not in seen}
                seen |= new.keys()
                yield list(new.values())

    async def finalize(self, batch_id: str) -> None:
        await self._put_once(batch_id, "finalizing", BatchMoment(at=int(time.time())))

    async def finish(self, batch_id: str, final: BatchFinal) -> None:
        """It is over, as the first says who says so."""
        await self._put_once(batch_id, "result", final)
        for key in await self._objects.keys(f"{layout.batch(self._tenant, batch_id)}/results"):
            await self._objects.delete(key)

    async def drop(self, batch_id: str) -> None:
        """All that is left of it; what says that it is one goes last."""
        record = layout.batch_record(self._tenant, batch_id, "batch")
        for key in await self._objects.keys(layout.batch(self._tenant, batch_id)):
            if key != record:
                await self._objects.delete(key)
        await self._objects.delete(record)

    async def _put_once(self, batch_id: str, name: str, record: Checked) -> None:
        key = layout.batch_record(self._tenant, batch_id, name)
        await self._objects.put_if_absent(key, seal(record.model_dump()).encode())

    async def _record(self, batch_id: str, name: str, kind: type[R]) -> R:
        key = layout.batch_record(self._tenant, batch_id, name)
        return await self._objects.record(key, partial(_parse, kind))

    @staticmethod
    def _lease(holder: str, attempt: int, seconds: float) -> bytes:
        lease = _Lease(holder=holder, attempt=attempt, until_ms=int((time.time() + seconds) * 1000))
        return seal(lease.model_dump()).encode()


def _parse(kind: type[R], content: bytes) -> R:
    return kind.model_validate(unseal(content))


def _rows(content: bytes) -> list[Row]:
    rows = []
    for line in content.splitlines():
        entry = parse_object(line)
        match entry:
            case {"line": int(number), "completed": bool(completed), "text": str(text)}:
                rows.append(Row(number, completed, text))
            case _:
                raise InvalidArgument("it has a line that is no answer")
    return rows
