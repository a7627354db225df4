"""The garbage collector: what nothing needs any more leaves Redis and object storage.

    hot         bytes in Redis beyond `keep_hot`, whose trimming a lease had put off
    version     durable versions beyond retention, and manifests that publishers left who were replaced or died
    blob        tensors that no manifest names

And what gc_records.py takes. Why none of this takes what a publisher at work or a reader needs is argued in
docs/store-protocol.md. Tombstones stay: there is one for each publication that was cut off, and each is needed as long
as its publisher might wake up.

Memory: the digest and the key of each version, about 300 bytes; never manifests or tensors. At most `_PARALLEL`
requests are under way at a time.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import TypeVar

from foundry.errors import DigestMismatch, StoreUnavailable
from foundry.store.manifest import Manifest
from foundry.store.names import tenant_of
from foundry.store.objects.objects import ObjectInfo
from foundry.store.objects.versions import Durable
from foundry.store.redis.connection import Connection
from foundry.store.redis.pointers import Pointers
from foundry.store.unreadable import skipped
from foundry.store.upkeep.gc_batches import BatchCollector
from foundry.store.upkeep.gc_records import RecordCollector
from foundry.store.upkeep.marks import DELETING_SECONDS, MARK_SECONDS, GcMarks
from foundry.store.upkeep.retention import Collected, Retention

_PARALLEL = 16
# Blobs that are marked at a time: few enough that their deletion ends well before the marks do.
_MARKED_AT_A_TIME = 500

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Version:
    name: str
    version: int
    digest: str
    document: str | None
    created_at: datetime
    entry: ObjectInfo


class Collector:
    """One collection. With `dry_run` nothing is changed, and what a real one would take is yielded."""

    def __init__(
        self,
        connection: Connection,
        pointers: Pointers,
        durable: Durable,
        marks: GcMarks,
        records: RecordCollector,
        batches: BatchCollector,
        retention: Retention,
        *,
        began: datetime,
        dry_run: bool,
    ) -> None:
        self._connection, self._pointers, self._durable = connection, pointers, durable
        self._marks, self._records, self._batches = marks, records, batches
        self._retention, self._began, self._dry_run = retention, began, dry_run
        self._old = retention.old(began)
        # Digests of manifests that stay, the documents that they name with their tenants, and the keys of all
        # manifests that were read.
        self._needed: set[str] = set()
        self._documents: set[tuple[str, str]] = set()
        self._read: set[str] = set()
        self._unreadable: list[str] = []
        # Digest -> versions whose hot bytes go: in a dry run Redis still counts them.
        self._hot_gone: defaultdict[str, set[str]] = defaultdict(set)

    async def collect(self) -> AsyncIterator[Collected]:
        """Raises StoreUnavailable; DigestMismatch, after all else, if a manifest can't be read: then no blob goes, and
        no document, which takes all runs to be read too."""
        if not self._dry_run:
            await self._marks.forget_dead()
        kept = (self._records.runs, self._batches.files, self._batches.batches)
        for part in (self._collect_hot, self._collect_versions, *kept, self._collect_blobs):
            async for collected in part():
                yield collected
        async for collected in self._records.texts(self._documents):
            yield collected

    # Hot bytes

    async def _collect_hot(self) -> AsyncIterator[Collected]:
        why = f"beyond the newest {self._retention.keep_hot} hot versions, and no longer leased"
        for name in await self._pointers.names():
            shares: Sequence[Sequence[str | int]] = ()
            with skipped("pointer", name):
                shares = (await self._connection.run("gc/trim", name, self._retention.keep_hot, int(self._dry_run)))[1]
            for share in shares:
                for collected in self._hot(name, share, why):
                    yield collected

    def _hot(self, name: str, share: Sequence[str | int], why: str) -> Iterable[Collected]:
        """What leaves Redis with a version; nothing if it has no bytes there, or was counted already."""
        version, digest, num_bytes, num_sharing = str(share[0]), str(share[1]), int(share[2]), int(share[3])
        key, gone = f"{name}@{version}", self._hot_gone[digest]
        if num_bytes == 0 or key in gone:
            return
        gone.add(key)
        left = num_sharing - (len(gone) if self._dry_run else 1)
        yield Collected("hot", key, 0 if left else num_bytes, why)

    # Versions

    async def _collect_versions(self) -> AsyncIterator[Collected]:
        entries: defaultdict[str, list[ObjectInfo]] = defaultdict(list)
        async for name, _, entry in self._durable.manifest_entries():
            entries[name].append(entry)
            self._read.add(entry.key)
        for name in sorted(entries):
            listed = entries.pop(name)
            found = [each async for each in _in_parallel(self._read_version, listed) if each]
            known: set[int] | None = None
            with skipped("pointer", name):
                known = await self._pointers.durable(name)
            if known is None:
                # Nobody can say what Redis still needs of the name.
                for each in found:
                    self._keep(each)
                continue
            async for collected in self._collect_withdrawn(name, listed, found, known):
                yield collected
            leftovers = [each for each in found if each.version not in known]
            wanted = sorted((each for each in found if each.version in known), key=lambda each: -each.version)
            for index, version in enumerate(wanted):
                why = self._beyond_retention(index, version)
                retired = await self._retire(version) if why else None
                if why is None or retired is None:
                    self._keep(version)
                    continue
                yield Collected("version", f"{name}@{version.version}", version.entry.size, why)
                for collected in self._hot(name, retired, why):
                    yield collected
            for version in leftovers:
                if await self._discard(version):
                    why = "left by a publication or a deletion that was cut off"
                    yield Collected("version", f"{name}@{version.version}", version.entry.size, why)
                else:
                    self._keep(version)

    def _keep(self, version: _Version) -> None:
        self._needed.add(version.digest)
        if version.document:
            # Whose it is the manifest does not say: a run without a tenant may publish under the name of one.
            self._documents |= {(tenant, version.document) for tenant in ("", tenant_of(version.name))}

    async def _collect_withdrawn(
        self, name: str, listed: list[ObjectInfo], found: list[_Version], known: set[int]
    ) -> AsyncIterator[Collected]:
        """Forget what a loss of Redis brought back while it was being withdrawn, before the blob goes."""
        whole = {each.entry.key for each in found} | set(self._unreadable)
        for entry in listed:
            version = int(entry.key.rpartition("/")[2].removesuffix(".json"))
            if entry.key not in whole and version in known:
                why = "withdrawn from a publisher that was replaced"
                reply = await self._connection.run("pointers/forget", name, version, int(self._dry_run))
                yield Collected("version", f"{name}@{version}", 0, why)
                for collected in self._hot(name, reply[1], why) if len(reply) > 1 else ():
                    yield collected

    async def _read_version(self, entry: ObjectInfo) -> _Version | None:
        with skipped("manifest", entry.key):
            manifest = await self._durable.read_manifest(entry.key)
            return _version_of(manifest, entry) if manifest else None
        self._unreadable.append(entry.key)
        return None

    def _beyond_retention(self, index: int, version: _Version) -> str | None:
        """Why the version may go; `index` counts down from the newest, 0, which is `latest` after a loss of Redis."""
        if index == 0:
            return None
        keep, days = self._retention.keep_last, self._retention.max_age_days
        if keep is not None and index >= keep:
            return f"beyond the newest {keep}"
        if days is not None and version.created_at < self._began - timedelta(days=days):
            return f"older than {days:g} days"
        return None

    async def _retire(self, version: _Version) -> Sequence[str | int] | None:
        """What it had in Redis; None if something still needs it."""
        reply = await self._connection.run("gc/retire", version.name, version.version, int(self._dry_run))
        if reply[0] != "ok":
            return None
        if not self._dry_run:
            await self._delete_manifest(version)
        return list(reply[1])

    async def _discard(self, version: _Version) -> bool:
        """Delete a manifest that Redis does not know; False if it may yet become a version."""
        if version.entry.last_modified >= self._old:
            return False
        reply = await self._connection.run("gc/retire", version.name, version.version, 1)
        if reply[0] != "unknown":
            return False
        if not self._dry_run:
            await self._delete_manifest(version)
        return True

    async def _delete_manifest(self, version: _Version) -> None:
        await self._durable.delete_manifest(version.name, version.version)
        # A rebuild that read the manifest before it went has made a pointer to it.
        await self._pointers.forget(version.name, version.version)

    # Blobs

    async def _collect_blobs(self) -> AsyncIterator[Collected]:
        if self._unreadable:
            raise DigestMismatch(
                f"{len(self._unreadable)} manifests can't be read ({self._unreadable[0]} ...) and what they need is "
                "not known: no blob was collected. 'foundry store verify' lists them; restore or delete them"
            )
        orphans = [
            (digest, entry.size)
            async for digest, entry in self._durable.blobs.entries()
            if digest not in self._needed and entry.last_modified < self._old
        ]
        remaining = iter(sorted(orphans))
        while batch := dict(islice(remaining, _MARKED_AT_A_TIME)):
            gone = self._would_go(batch) if self._dry_run else self._delete_blobs(batch)
            async for digest in gone:
                yield Collected("blob", digest, batch[digest], "no manifest names it")

    async def _would_go(self, digests: Iterable[str]) -> AsyncIterator[str]:
        for digest, answer in await self._mark(0, digests):
            if set(answer.split()) <= self._hot_gone[digest]:
                yield digest

    async def _delete_blobs(self, digests: Iterable[str]) -> AsyncIterator[str]:
        # On an error the marks stay until they expire: a deletion may be on its way.
        batch = str(uuid.uuid4())
        await self._marks.put(batch, list(digests))
        deadline = time.monotonic() + DELETING_SECONDS
        marked = [digest for digest, answer in await self._mark(int(MARK_SECONDS * 1000), digests) if not answer]
        # From here on nobody begins to publish these digests; who did before has left a manifest, or is leased.
        spared = await self._named_meanwhile()

        async def delete(digest: str) -> str | None:
            return digest if digest not in spared and await self._delete_blob(digest, deadline) else None

        async for deleted in _in_parallel(delete, marked):
            if deleted:
                yield deleted
        if marked:
            await self._connection.run("gc/unmark", *marked)
        await self._marks.delete(batch)

    async def _mark(self, mark_ms: int, digests: Iterable[str]) -> list[tuple[str, str]]:
        """Each digest with what keeps it: '' if it is marked, or would be where `mark_ms` is 0."""
        listed = list(digests)
        reply = await self._connection.run("gc/mark", mark_ms, *listed)
        return list(zip(listed, reply[1], strict=True))

    async def _named_meanwhile(self) -> set[str]:
        """Digests of manifests that were written since they were listed first."""
        found = set()
        async for _, _, entry in self._durable.manifest_entries():
            if entry.key not in self._read:
                manifest = await self._durable.read_manifest(entry.key)
                if manifest:
                    found.add(manifest.digest)
        return found

    async def _delete_blob(self, digest: str, deadline: float) -> bool:
        entry = await self._durable.blobs.entry(digest)
        if entry is None or entry.last_modified >= self._old:
            return False
        if time.monotonic() > deadline:
            raise StoreUnavailable(
                f"object storage is so slow that blobs can't be deleted safely within {DELETING_SECONDS:.0f} seconds; "
                "what was printed is gone, run it again later"
            )
        try:
            async with asyncio.timeout(DELETING_SECONDS):
                await self._durable.blobs.delete(digest)
        except TimeoutError as error:
            raise StoreUnavailable(f"object storage did not delete the blob of {digest} in time") from error
        return True


def _version_of(manifest: Manifest, entry: ObjectInfo) -> _Version:
    created_at = datetime.fromisoformat(manifest.created_at)
    return _Version(manifest.name, manifest.version, manifest.digest, manifest.document, created_at, entry)


async def _in_parallel(function: Callable[[Item], Awaitable[Result]], items: Sequence[Item]) -> AsyncIterator[Result]:
    for begin in range(0, len(items), _PARALLEL):
        for result in await asyncio.gather(*(function(item) for item in items[begin : begin + _PARALLEL])):
            yield result
