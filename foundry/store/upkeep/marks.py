"""Which blobs a garbage collector is deleting, written where a loss of Redis can't undo it.

Redis holds the marks that publishers meet (`foundry:condemned:<digest>`); a rebuild restores them from here, so that
nobody puts a blob that a collector, which has not noticed the loss, then deletes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from foundry.errors import StoreUnavailable
from foundry.store.objects import layout
from foundry.store.objects.objects import Objects
from foundry.store.sealed import seal, unseal
from foundry.store.spec import Digest
from foundry.validation import Checked

# How long a mark stands if its collector dies. A collector begins no deletion later than DELETING_SECONDS after it
# marked the blob, and gives up waiting for one as long again after that: a request on its way then has the rest to
# arrive.
MARK_SECONDS = 300.0
DELETING_SECONDS = 60.0
# To delete a batch of blobs takes seconds.
_WAIT_SECONDS = 30.0
_POLL_SECONDS = 0.1

Answer = TypeVar("Answer")


class _Mark(Checked):
    digests: list[Digest]


class GcMarks:
    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    async def put(self, batch: str, digests: list[str]) -> None:
        await self._objects.put(layout.mark(batch), [seal({"digests": digests}).encode()])

    async def delete(self, batch: str) -> None:
        await self._objects.delete(layout.mark(batch))

    async def digests(self) -> tuple[set[str], bool]:
        """All that may be being deleted, and whether these are all: False if a record can't be read."""
        keys = await self._objects.keys_here(layout.MARKS)
        read = await self._objects.records("mark", keys, lambda _, content: _mark(content))
        whole = all([key in read or not await self._objects.exists(key) for key in keys])
        return {digest for mark in read.values() for digest in mark.digests}, whole

    async def check(self, key: str) -> int:
        """Bytes that were hashed. Raises NotFound, DigestMismatch."""
        await self._objects.record(key, _mark)
        return 0

    async def forget_dead(self) -> None:
        """Delete what collectors left that died: every mark of theirs has expired."""
        before = datetime.now(UTC) - timedelta(seconds=2 * MARK_SECONDS)
        async for entry in self._objects.scan(layout.MARKS):
            if entry.last_modified < before:
                await self._objects.delete(entry.key)


def _mark(content: bytes) -> _Mark:
    return _Mark.model_validate(unseal(content))


async def while_marked(digest: str, ask: Callable[[], Awaitable[Answer | None]]) -> Answer:
    """Ask until there is an answer: None while a collector deletes the blob. Raises StoreUnavailable if that lasts."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while (answer := await ask()) is None:
        if time.monotonic() > deadline:
            raise StoreUnavailable(
                f"a garbage collector has been deleting an old blob of {digest} for {_WAIT_SECONDS:.0f} seconds; if it "
                f"died, its mark goes {MARK_SECONDS:.0f} seconds after it was set: try again then",
                retry_after_seconds=MARK_SECONDS,
            )
        await asyncio.sleep(_POLL_SECONDS)
    return answer
