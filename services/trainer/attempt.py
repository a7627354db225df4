"""One attempt at a run, as the store knows it: all that a run asks of the store, under the attempt's fencing number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foundry.identity import CartridgeBytes
from foundry.rpc.retry import Retry
from foundry.store import (
    CartridgeStore,
    ClaimedRun,
    DatasetStore,
    DatasetSummary,
    Desired,
    Manifest,
    ManifestDraft,
    RunSpec,
    RunState,
)
from foundry.v1 import common_pb2
from services.trainer.trackers.tracker import Tracker

Json = dict[str, Any]


class Attempt:
    """Waits while the store is away, but for `heartbeat` and `requeue`, whose time is short.

    What changes anything raises Fenced once another attempt has the run.
    """

    def __init__(
        self, claimed: ClaimedRun, store: CartridgeStore, retry: Retry, trackers: Sequence[Tracker] = ()
    ) -> None:
        """`trackers` are told what those who follow the run are told, and how it ended."""
        self.claimed, self.retry, self._trackers = claimed, retry, trackers
        self._store, self._runs = store, store.runs
        self._held = (claimed.run_id, claimed.attempt)

    @property
    def spec(self) -> RunSpec:
        return self.claimed.spec

    @property
    def caller(self) -> common_pb2.Caller:
        """Who asks rollout servers and teachers: each run is a client."""
        return common_pb2.Caller(tenant=self.claimed.tenant, client=self.claimed.run_id)

    # The run itself

    async def tell(self, event: Mapping[str, Any]) -> None:
        """Those who follow the run."""
        await self.retry.call("store", lambda: self._runs.report(*self._held, event))
        for tracker in self._trackers:
            tracker.tell(event)

    async def heartbeat(self, lease_seconds: float, state: RunState) -> Desired:
        waiting_for = self.retry.waiting_for
        return await self._runs.heartbeat(*self._held, lease_seconds, state=state, waiting_for=waiting_for)

    async def requeue(self, result: Mapping[str, Any]) -> None:
        await self._runs.requeue(*self._held, result=result)

    async def finish(self, state: RunState, error: str | None, result: Mapping[str, Any]) -> None:
        await self.retry.call("store", lambda: self._runs.finish(*self._held, state, error=error, result=result))
        for tracker in self._trackers:
            tracker.tell({"type": "finished", "state": state, "error": error, "result": result})

    async def traceparent(self) -> str:
        return await self.retry.call("store", lambda: self._runs.traceparent(self.claimed.run_id))

    # Its cartridge

    async def acquire(self) -> None:
        """From now on this attempt alone publishes under the run's name."""
        await self.retry.call("store", lambda: self._store.acquire(self.spec.name, *self._held))

    async def release(self) -> None:
        await self.retry.call("store", lambda: self._store.release(self.spec.name, *self._held))

    async def publish(self, stored: CartridgeBytes, draft: ManifestDraft, *, durable: bool) -> Manifest:
        return await self.retry.call("store", lambda: self._store.publish(stored, draft, durable=durable))

    async def tag(self, tag: str, version: int) -> None:
        await self.retry.call("store", lambda: self._store.tag(self.spec.name, tag, version))

    async def version(self, reference: str) -> CartridgeBytes:
        """The bytes of any cartridge. Raises CartridgeNotFound, InvalidArgument."""

        async def fetch() -> CartridgeBytes:
            return await self._store.fetch((await self._store.resolve(reference)).digest)

        return await self.retry.call("store", fetch)

    # What it reads and keeps

    async def document(self, digest: str) -> str:
        return await self.retry.call("store", lambda: self._store.documents.of(self.claimed.tenant).get(digest))

    async def save_checkpoint(self, step: int, content: bytes) -> None:
        await self.retry.call("store", lambda: self._runs.save_checkpoint(*self._held, step, [content]))

    async def load_checkpoint(self) -> bytes | None:
        """The newest of any attempt."""
        kept = await self.retry.call("store", lambda: self._runs.load_checkpoint(self.claimed.run_id))
        return kept[1] if kept is not None else None

    @property
    def _datasets(self) -> DatasetStore:
        return self._store.datasets.of(self.claimed.tenant)

    async def read_shard(self, dataset: str, family: str, number: int) -> list[Json] | None:
        """None if it is not written yet."""
        return await self.retry.call("store", lambda: self._datasets.shard(dataset, family, number))

    async def append_shard(self, dataset: str, family: str, number: int, rows: Sequence[Json]) -> list[Json]:
        """Returns what stands: an attempt that was first may have written it."""
        return await self.retry.call("store", lambda: self._datasets.append(dataset, family, number, rows))

    async def finish_dataset(self, dataset: str, summary: DatasetSummary) -> DatasetSummary:
        return await self.retry.call("store", lambda: self._datasets.finish(dataset, summary))
