"""Checking what the store keeps beside cartridges: documents, data sets, API keys, grants, runs, their checkpoints,
and marks.

Memory: the keys of data sets and runs, and one document, shard, or range of a checkpoint at a time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from functools import partial

from foundry.errors import DigestMismatch, NotFound
from foundry.store.datasets import DatasetStore
from foundry.store.documents import DocumentStore
from foundry.store.grants import GrantStore
from foundry.store.key_store import KeyStore
from foundry.store.objects import layout
from foundry.store.objects.checkpoints import Checkpoints
from foundry.store.objects.objects import Objects
from foundry.store.redis.keys import key as redis_key
from foundry.store.runs import RunStore
from foundry.store.upkeep.marks import GcMarks
from foundry.store.upkeep.verified import Kind, Verified, looked_at


class RecordVerifier:
    def __init__(
        self,
        objects: Objects,
        documents: DocumentStore,
        datasets: DatasetStore,
        api_keys: KeyStore,
        grants: GrantStore,
        runs: RunStore,
        checkpoints: Checkpoints,
        marks: GcMarks,
    ) -> None:
        self._objects, self._documents, self._datasets = objects, documents, datasets
        self._api_keys, self._grants = api_keys, grants
        self._runs, self._checkpoints, self._marks = runs, checkpoints, marks

    async def verify(self) -> AsyncIterator[Verified]:
        for part in (
            self._all_documents,
            self._all_datasets,
            self._all_api_keys,
            self._all_grants,
            self._all_runs,
            self._queue,
            self._all_marks,
        ):
            async for checked in part():
                yield checked

    async def _all_documents(self) -> AsyncIterator[Verified]:
        async for entry in self._objects.scan(layout.DOCUMENTS):
            if match := layout.DOCUMENT.fullmatch(entry.key):
                document = self._document(self._documents.of(match["tenant"]), f"blake3:{match['hex']}")
                async for checked in self._object("document", entry.key, document):
                    yield checked

    @staticmethod
    async def _document(documents: DocumentStore, digest: str) -> int:
        info = await documents.info(digest)
        num_bytes = len((await documents.get(digest)).encode())
        if num_bytes != info.num_bytes:
            raise DigestMismatch(f"document {digest} has {num_bytes} bytes, its record says {info.num_bytes}")
        return num_bytes

    async def _all_datasets(self) -> AsyncIterator[Verified]:
        shards: defaultdict[tuple[str, str], list[tuple[str, int]]] = defaultdict(list)
        whole: set[tuple[str, str]] = set()
        async for entry in self._objects.scan(layout.DATASETS):
            if match := layout.SHARD.fullmatch(entry.key):
                shards[match["tenant"], f"blake3:{match['hex']}"].append((match["family"], int(match["number"])))
            elif match := layout.SUMMARY.fullmatch(entry.key):
                whole.add((match["tenant"], f"blake3:{match['hex']}"))
        for tenant, dataset in sorted(whole | shards.keys()):
            num_rows: Counter[str] = Counter()
            for family, number in sorted(shards[tenant, dataset]):
                key = layout.dataset_shard(tenant, dataset, family, number)
                shard = self._shard(tenant, dataset, family, number, num_rows)
                async for checked in self._object("dataset", key, shard):
                    yield checked
            if (tenant, dataset) in whole:
                key = layout.dataset_summary(tenant, dataset)
                async for checked in self._object("dataset", key, self._summary(tenant, dataset, num_rows)):
                    yield checked

    async def _shard(self, tenant: str, dataset: str, family: str, number: int, num_rows: Counter[str]) -> int:
        """Counts the rows by what they are of."""
        rows = await self._datasets.of(tenant).shard(dataset, family, number)
        if rows is None:
            raise NotFound(f"shard {number} of {family} of data set {dataset} is gone")
        num_rows.update(str(row.get("family")) for row in rows)
        return (await self._objects.head(layout.dataset_shard(tenant, dataset, family, number))).size

    async def _summary(self, tenant: str, dataset: str, num_rows: Counter[str]) -> int:
        summary = await self._datasets.of(tenant).summary(dataset)
        for family, counts in sorted(summary.families.items()):
            if num_rows[family] < (expected := counts.get("conversations", 0)):
                raise NotFound(f"of {expected} conversations of {family} there are {num_rows[family]}")
        return (await self._objects.head(layout.dataset_summary(tenant, dataset))).size

    async def _all_api_keys(self) -> AsyncIterator[Verified]:
        async for entry in self._objects.scan(layout.API_KEYS):
            if match := layout.API_KEY.fullmatch(entry.key):
                async for checked in self._object("api_key", entry.key, self._api_key(match["id"])):
                    yield checked

    async def _api_key(self, key_id: str) -> int:
        await self._api_keys.get(key_id)
        return 0

    async def _all_grants(self) -> AsyncIterator[Verified]:
        async for entry in self._objects.scan(layout.GRANTS):
            if match := layout.GRANT.fullmatch(entry.key):
                async for checked in self._object("grant", entry.key, self._grant(match["name"], match["tenant"])):
                    yield checked

    async def _grant(self, name: str, tenant: str) -> int:
        await self._grants.get(name, tenant)
        return 0

    async def _all_runs(self) -> AsyncIterator[Verified]:
        runs, checkpoints = [], []
        async for entry in self._objects.scan(layout.RUNS):
            if match := layout.RUN_RECORD.fullmatch(entry.key):
                runs.append(match["run"])
            elif entry.key.endswith(".json") and (match := layout.CHECKPOINT.fullmatch(entry.key)):
                checkpoints.append(match["stem"])
        for run_id in sorted(runs):
            key = layout.run_record(run_id, "run.json")
            async for checked in self._object("run", key, self._runs.check(run_id)):
                yield checked
        for stem in sorted(checkpoints):
            async for checked in self._object("checkpoint", f"{stem}.json", self._checkpoints.check(stem)):
                yield checked

    async def _queue(self) -> AsyncIterator[Verified]:
        """Runs as Redis has them. That it can't say which there are is said where its keys are checked."""
        run_ids: list[str] = []
        with suppress(DigestMismatch):
            run_ids = await self._runs.ids()
        for run_id in run_ids:
            try:
                await self._runs.listed(run_id)
            except DigestMismatch as error:
                yield Verified("corrupt", "run", redis_key("run", run_id), 0, error.message)

    async def _all_marks(self) -> AsyncIterator[Verified]:
        for key in await self._objects.keys_here(layout.MARKS):
            async for checked in self._object("mark", key, self._marks.check(key)):
                yield checked

    def _object(self, kind: Kind, key: str, check: Awaitable[int]) -> AsyncIterator[Verified]:
        return looked_at(kind, key, check, partial(self._objects.exists, key))
