"""Checking the store: whether every version can be read, bit for bit, and what is there that nothing names.

Memory: the digest and key of each version, and one range of a blob or one hot cartridge at a time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

from foundry.errors import DigestMismatch
from foundry.store.objects.objects import ObjectInfo
from foundry.store.objects.versions import Durable
from foundry.store.redis.connection import RESTORE
from foundry.store.redis.hot_bytes import HotBytes
from foundry.store.redis.pointers import Pointers
from foundry.store.upkeep.verified import Verified
from foundry.store.upkeep.verify_records import RecordVerifier


class Verifier:
    def __init__(
        self, pointers: Pointers, durable: Durable, hot: HotBytes, records: RecordVerifier, *, grace_seconds: float
    ) -> None:
        self._pointers, self._durable, self._hot, self._records = pointers, durable, hot, records
        # What is younger may be half published.
        self._old = datetime.now(UTC) - timedelta(seconds=grace_seconds)
        # Digest -> a version that needs it, by the key of its manifest.
        self._needed: dict[str, str] = {}
        self._versions: dict[str, set[int]] = {}

    async def verify(self) -> AsyncIterator[Verified]:
        """Raises StoreUnavailable. What is published or collected meanwhile is not held against the store."""
        for part in (
            self._manifests,
            self._blobs,
            self._orphans,
            self._tags,
            self._keys,
            self._pointers_to_versions,
            self._hot_bytes,
            self._records.verify,
        ):
            async for checked in part():
                yield checked

    async def _manifests(self) -> AsyncIterator[Verified]:
        async for name, version, entry in self._durable.manifest_entries():
            self._versions.setdefault(name, set())
            try:
                manifest = await self._durable.read_manifest(entry.key)
            except DigestMismatch as error:
                yield Verified("corrupt", "manifest", entry.key, entry.size, error.message)
                continue
            if manifest is None:
                continue
            self._versions[name].add(version)
            self._needed.setdefault(manifest.digest, entry.key)
            yield Verified("ok", "manifest", entry.key, entry.size, "")

    async def _blobs(self) -> AsyncIterator[Verified]:
        for digest, manifest_key in sorted(self._needed.items()):
            try:
                num_bytes = await self._durable.blobs.check(digest)
            except DigestMismatch as error:
                yield Verified("corrupt", "blob", digest, 0, error.message)
                continue
            if num_bytes is not None:
                yield Verified("ok", "blob", digest, num_bytes, "")
            elif await self._durable.read_manifest(manifest_key) is not None:
                yield Verified("missing", "blob", digest, 0, f"{manifest_key} names it")

    async def _orphans(self) -> AsyncIterator[Verified]:
        async for digest, entry in self._durable.blobs.entries():
            if digest not in self._needed and self._is_old(entry):
                yield Verified("orphaned", "blob", digest, 0, f"no manifest names its {entry.size} bytes")

    async def _tags(self) -> AsyncIterator[Verified]:
        for name, versions in sorted(self._versions.items()):
            for tag in await self._durable.tag_names(name):
                try:
                    record = await self._durable.tag_record(name, tag)
                    if record is None:
                        continue
                    if record.version in versions or await self._has_manifest(name, record.version):
                        yield Verified("ok", "tag", f"{name}@{tag}", 0, "")
                    elif await self._durable.tag_record(name, tag) == record:
                        why = f"it means version {record.version}, which is gone"
                        yield Verified("missing", "tag", f"{name}@{tag}", 0, why)
                except DigestMismatch as error:
                    why = f"{error.message}: tag the version that it is to mean"
                    yield Verified("corrupt", "tag", f"{name}@{tag}", 0, why)

    async def _keys(self) -> AsyncIterator[Verified]:
        async for key in self._pointers.keys_of_wrong_type():
            yield Verified("corrupt", "pointer", key, 0, f"it is of another type in Redis than ours are. {RESTORE}")

    async def _pointers_to_versions(self) -> AsyncIterator[Verified]:
        try:
            names = await self._pointers.names()
        except DigestMismatch:
            # Said of its key.
            names = []
        for name in sorted({*names, *self._versions}):
            durable: set[int] = set()
            try:
                durable = await self._pointers.durable(name)
                await self._pointers.check(name)
            except DigestMismatch as error:
                yield Verified("corrupt", "pointer", name, 0, error.message)
            for version in sorted(durable):
                key = f"{name}@{version}"
                if version in self._versions.get(name, ()) or await self._has_manifest(name, version):
                    yield Verified("ok", "pointer", key, 0, "")
                elif version in await self._pointers.durable(name):
                    why = (
                        "Redis has it as durable, object storage has no manifest of it: 'foundry store rebuild --force'"
                    )
                    yield Verified("missing", "pointer", key, 0, why)

    async def _hot_bytes(self) -> AsyncIterator[Verified]:
        async for digest in self._pointers.hot_digests():
            try:
                stored = await self._hot.get(digest)
                if stored is not None:
                    yield Verified("ok", "hot", digest, stored.header.num_bytes, "")
                elif versions := await self._pointers.hot_versions(digest):
                    why = f"Redis lacks a part of the bytes of {', '.join(versions)}"
                    yield Verified("missing", "hot", digest, 0, why)
            except DigestMismatch as error:
                yield Verified("corrupt", "hot", digest, 0, error.message)

    async def _has_manifest(self, name: str, version: int) -> bool:
        """Asked again: it may have been published since the listing."""
        return version in await self._durable.whole_versions(name)

    def _is_old(self, entry: ObjectInfo) -> bool:
        return entry.last_modified < self._old
