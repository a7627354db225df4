"""Collecting files whose time is over, and batches that ended longer ago than files are kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from datetime import datetime, timedelta

from foundry.errors import NotFound
from foundry.store.batches import BatchStore
from foundry.store.files import FileStore
from foundry.store.objects import layout
from foundry.store.objects.objects import ObjectInfo, Objects
from foundry.store.unreadable import skipped
from foundry.store.upkeep.retention import Collected

_BATCH_DAYS = 30


class BatchCollector:
    """A part of one collection; `dry_run` as there."""

    def __init__(self, objects: Objects, *, began: datetime, old: datetime, dry_run: bool) -> None:
        """What is newer than `old` may be half written."""
        self._objects, self._began, self._old, self._dry_run = objects, began, old, dry_run

    async def files(self) -> AsyncIterator[Collected]:
        found: defaultdict[tuple[str, str], list[ObjectInfo]] = defaultdict(list)
        async for entry in self._objects.scan(layout.FILES):
            if match := layout.FILE_PART.fullmatch(entry.key):
                found[match["owner"].removeprefix("-"), match["id"]].append(entry)
        for (tenant, file_id), entries in sorted(found.items()):
            files = FileStore(self._objects, tenant=tenant)
            with skipped("file", file_id):
                try:
                    why = "its time is over" if await files.expires_at(file_id) <= self._began.timestamp() else ""
                except NotFound:
                    old = max(entry.last_modified for entry in entries) < self._old
                    why = "left by an upload or a deletion that was cut off" if old else ""
                if why:
                    if not self._dry_run:
                        await files.drop(file_id)
                    key = layout.file(tenant, file_id, "bin")
                    yield Collected("file", key, sum(entry.size for entry in entries), why)

    async def batches(self) -> AsyncIterator[Collected]:
        found: defaultdict[tuple[str, str], dict[str, ObjectInfo]] = defaultdict(dict)
        async for entry in self._objects.scan(layout.BATCHES):
            if match := layout.BATCH_PART.fullmatch(entry.key):
                found[match["owner"].removeprefix("-"), match["id"]][match["part"]] = entry
        before = self._began - timedelta(days=_BATCH_DAYS)
        for (tenant, batch_id), parts in sorted(found.items()):
            if "result" in parts and parts["result"].last_modified < before:
                if not self._dry_run:
                    await BatchStore(self._objects, tenant=tenant).drop(batch_id)
                size = sum(entry.size for entry in parts.values())
                yield Collected(
                    "batch", layout.batch(tenant, batch_id), size, f"it ended more than {_BATCH_DAYS} days ago"
                )
