"""Collecting what the store keeps beside cartridges: runs that ended, documents and data sets.

Memory: the keys of runs, documents and data sets, and what each run asked for.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Set
from contextlib import suppress
from datetime import datetime
from itertools import islice

from foundry.errors import NotFound
from foundry.store.datasets import DatasetStore
from foundry.store.documents import DocumentStore
from foundry.store.objects import layout
from foundry.store.objects.objects import ObjectInfo, Objects
from foundry.store.redis.keys import key
from foundry.store.runs import RunStore
from foundry.store.spec import RunSpec
from foundry.store.unreadable import skipped
from foundry.store.upkeep.retention import Collected, Retention

# Documents and data sets that are deleted between two looks at the runs.
_BETWEEN_LOOKS = 100


class RecordCollector:
    """A part of one collection; `dry_run` as there."""

    def __init__(
        self,
        objects: Objects,
        runs: RunStore,
        documents: DocumentStore,
        datasets: DatasetStore,
        retention: Retention,
        *,
        began: datetime,
        dry_run: bool,
    ) -> None:
        self._objects, self._runs, self._documents, self._datasets = objects, runs, documents, datasets
        self._retention, self._began, self._dry_run = retention, began, dry_run
        self._gone: set[str] = set()
        # By run: its tenant and what it asked for.
        self._asked: dict[str, tuple[str, RunSpec]] = {}
        self._over: set[str] = set()

    # Runs

    async def runs(self) -> AsyncIterator[Collected]:
        """Runs that ended longer ago than wanted, what deletions left, and checkpoints of runs that are over."""
        files: defaultdict[str, list[ObjectInfo]] = defaultdict(list)
        async for entry in self._objects.scan(layout.RUNS):
            if match := layout.RUN_FILE.fullmatch(entry.key):
                files[match["run"]].append(entry)
        # Behind the listing: so a run without a record that is not among them was none then.
        known: set[str] | None = None
        with skipped("run", key("runs")):
            known = set(await self._runs.ids())
        for run_id, entries in sorted(files.items()):
            if why := self._why_it_goes(run_id, entries, known):
                if not self._dry_run:
                    await self._runs.drop(run_id)
                self._gone.add(run_id)
                yield Collected("run", layout.run(run_id), sum(entry.size for entry in entries), why)
            elif _ended(run_id, entries, before=self._retention.old(self._began)):
                # Of a checkpoint the json comes first: without it the rest is none.
                for entry in sorted(entries, key=lambda entry: entry.key):
                    if layout.CHECKPOINT.fullmatch(entry.key):
                        if not self._dry_run:
                            await self._objects.delete(entry.key)
                        yield Collected("checkpoint", entry.key, entry.size, "its run is over")

    def _why_it_goes(self, run_id: str, entries: list[ObjectInfo], known: Set[str] | None) -> str | None:
        days = self._retention.keep_runs_days
        if days is not None and _ended(run_id, entries, before=self._retention.old(self._began, days)):
            return f"it ended more than {days:g} days ago"
        begun = any(entry.key == layout.run_record(run_id, "run.json") for entry in entries)
        if begun or known is None or run_id in known:
            return None
        newest = max(entry.last_modified for entry in entries)
        return "left by a deletion that was cut off" if newest < self._retention.old(self._began) else None

    # Documents and data sets

    async def texts(self, named: Set[tuple[str, str]]) -> AsyncIterator[Collected]:
        """Old documents that no run names, nor `named` (tenant, digest), and old data sets of tenants all of whose runs
        are over. Raises DigestMismatch if a run can't be read: then nothing goes."""
        days = self._retention.keep_documents_days
        if days is None:
            return
        old = self._retention.old(self._began, days)
        remaining = iter(
            [("document", *each) for each in await self._older(layout.DOCUMENTS, old)]
            + [("dataset", *each) for each in await self._older(layout.DATASETS, old)]
        )
        await self._look_at_runs()
        while batch := list(islice(remaining, _BETWEEN_LOOKS)):
            # Again, for those that began since: docs/store-protocol.md says what that leaves open.
            await self._look_at_runs()
            needed = named | {(tenant, digest) for tenant, spec in self._asked.values() for digest in spec.texts}
            working = {tenant for run_id, (tenant, _) in self._asked.items() if run_id not in self._over}
            for kind, tenant, digest, num_bytes in batch:
                if kind == "document" and (tenant, digest) not in needed and await self._delete(tenant, digest, old):
                    why = f"older than {days:g} days, and neither a run nor a manifest names it"
                    yield Collected("document", layout.document(tenant, digest), num_bytes, why)
                elif kind == "dataset" and tenant not in working:
                    if not self._dry_run:
                        await self._datasets.of(tenant).delete(digest)
                    why = f"older than {days:g} days, and all runs of its tenant are over"
                    yield Collected("dataset", layout.dataset(tenant, digest), num_bytes, why)

    async def _older(self, directory: str, before: datetime) -> list[tuple[str, str, int]]:
        """(tenant, digest, bytes) of what has nothing newer."""
        files: defaultdict[tuple[str, str], list[ObjectInfo]] = defaultdict(list)
        async for entry in self._objects.scan(directory):
            if match := layout.TEXT_FILE.fullmatch(entry.key):
                files[match["tenant"], f"blake3:{match['hex']}"].append(entry)
        return [
            (tenant, digest, sum(entry.size for entry in entries))
            for (tenant, digest), entries in sorted(files.items())
            if max(entry.last_modified for entry in entries) < before
        ]

    async def _delete(self, tenant: str, digest: str, before: datetime) -> bool:
        """False if it was put again, or deleted, meanwhile."""
        with suppress(NotFound):
            if (await self._objects.head(layout.document(tenant, digest))).last_modified >= before:
                return False
        if not self._dry_run:
            try:
                await self._documents.of(tenant).delete(digest)
            except NotFound:
                return False
        return True

    async def _look_at_runs(self) -> None:
        """What was asked for since the last look. Raises DigestMismatch."""
        found: set[str] = set()
        async for entry in self._objects.scan(layout.RUNS):
            if match := layout.RUN_RECORD.fullmatch(entry.key):
                found.add(match["run"])
            elif entry.key.endswith("/result.json"):
                self._over.add(entry.key.split("/")[1])

        async def read(run_id: str) -> None:
            # Gone is what was deleted since it was listed.
            with suppress(NotFound):
                self._asked[run_id] = await self._runs.asked(run_id)

        await asyncio.gather(*map(read, sorted(found - self._asked.keys() - self._gone)))


def _ended(run_id: str, entries: list[ObjectInfo], *, before: datetime) -> bool:
    result = layout.run_record(run_id, "result.json")
    return any(entry.key == result and entry.last_modified < before for entry in entries)
