"""Durable truth about cartridges: how the manifests, tags and limits in object storage are read and written."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from functools import partial

from foundry.errors import CartridgeNotFound, Conflict, DigestMismatch, Fenced, InvalidArgument, NotFound
from foundry.store.manifest import Manifest
from foundry.store.names import LATEST, CartridgeId, Reference
from foundry.store.objects import layout
from foundry.store.objects.blobs import Blobs
from foundry.store.objects.objects import ETag, ObjectInfo, Objects
from foundry.store.tags import TagRecord
from foundry.store.unreadable import damaged_version, skipped

# Numbers handed out per write of a limit: what a loss of Redis may skip.
LIMIT_STEP = 100
_TOMBSTONE = {"withdrawn": True}


class Durable:
    def __init__(self, objects: Objects, *, max_cartridge_bytes: int) -> None:
        self.blobs = Blobs(objects, max_cartridge_bytes=max_cartridge_bytes)
        self._objects = objects

    # Manifests

    async def put_manifest(self, manifest: Manifest) -> Manifest:
        """Write the manifest unless there is one; the one that stands is returned.

        Raises Conflict if another digest has the number, Fenced if the number was withdrawn from this publisher.
        """
        key = layout.manifest(manifest.name, manifest.version)
        if await self._objects.put_if_absent(key, manifest.to_json().encode()):
            return manifest
        standing = await self._manifest(key)
        if standing is None:
            raise Fenced(f"{manifest.id} was withdrawn when another run or attempt took the name over")
        if standing.digest != manifest.digest:
            raise Conflict(
                f"{manifest.id} exists with digest {standing.digest}, not {manifest.digest}", field="version"
            )
        return standing

    async def withdraw(self, name: str, version: int) -> None:
        """Put a tombstone where a replaced publisher left a manifest, or would yet write one."""
        await self._objects.put(layout.manifest(name, version), [json.dumps(_TOMBSTONE).encode()])

    async def manifest(self, name: str, version: int) -> Manifest:
        with suppress(NotFound):
            if (found := await self._manifest(layout.manifest(name, version))) is not None:
                return found
        raise CartridgeNotFound(f"there is no durable cartridge {name}@{version}", field="version")

    async def manifests(self, name: str) -> list[Manifest]:
        """Those that can be read, oldest first."""
        return (await self.whole_and_damaged(name))[0]

    async def whole_and_damaged(self, name: str) -> tuple[list[Manifest], set[int]]:
        """The manifests that can be read, oldest first, and the numbers of those that can't."""
        keys = {layout.manifest(name, version): version for version in await self.versions(name)}
        found = await self._objects.records("manifest", keys, _manifest_at)
        damaged = {keys[key] for key in keys.keys() - found.keys() if await self._objects.exists(key)}
        return sorted((each for each in found.values() if each), key=lambda manifest: manifest.version), damaged

    async def whole_versions(self, name: str) -> set[int]:
        """Numbers of manifests that can be read."""
        return {manifest.version for manifest in await self.manifests(name)}

    async def manifest_entries(self) -> AsyncIterator[tuple[str, int, ObjectInfo]]:
        """(name, version, object) of every manifest and tombstone, unread and in no order."""
        async for entry in self._objects.scan(layout.CARTRIDGES):
            if match := layout.MANIFEST.fullmatch(entry.key):
                yield match["name"], int(match["version"]), entry

    async def read_manifest(self, key: str) -> Manifest | None:
        """None if it is a tombstone or was deleted. Raises DigestMismatch if it is neither that nor a manifest."""
        with suppress(NotFound):
            return await self._manifest(key)
        return None

    async def delete_manifest(self, name: str, version: int) -> bool:
        """False if there was none."""
        key = layout.manifest(name, version)
        # Asked first, because s3 deletes what does not exist without a word.
        if not await self._objects.exists(key):
            return False
        await self._objects.delete(key)
        return True

    async def resolve(self, reference: Reference) -> CartridgeId:
        """What the reference means by object storage alone: `latest` is the highest durable version.

        Raises CartridgeNotFound, DigestMismatch if that version can't be read.
        """
        name, selector = reference.name, reference.selector
        if isinstance(selector, int):
            return await self._id(reference, selector)
        if reference.immutable:
            found = [manifest.id for manifest in await self.manifests(name) if manifest.digest == selector]
            if found:
                return found[0]
        elif selector == LATEST:
            for version in reversed(await self.versions(name)):
                try:
                    return await self._id(reference, version)
                except CartridgeNotFound:
                    continue  # a tombstone
        elif record := await self.tag_record(name, selector):
            return await self._id(reference, record.version)
        raise CartridgeNotFound(f"there is no durable cartridge {reference}", field="model")

    async def _id(self, reference: Reference, version: int) -> CartridgeId:
        try:
            return (await self.manifest(reference.name, version)).id
        except DigestMismatch as error:
            raise damaged_version(reference, version) from error

    # Tags

    async def put_tag(self, name: str, tag: str, record: TagRecord, over: ETag | None) -> bool:
        """Write what a tag means, over the record that `over` names or over none. False if another one stands there."""
        key, content = layout.tag(name, tag), record.to_json().encode()
        if over is None:
            return await self._objects.put_if_absent(key, content)
        return await self._objects.put_if_match(key, content, over)

    async def delete_tag(self, name: str, tag: str) -> None:
        await self._objects.delete(layout.tag(name, tag))

    async def tag(self, name: str, tag: str) -> tuple[TagRecord | None, ETag | None]:
        """The record and its ETag; an unreadable one is as none, but is written over. (None, None) if there is none."""
        key = layout.tag(name, tag)
        etag: ETag | None = None
        with suppress(NotFound), skipped("tag", key):
            # First: over what another writes after this look nothing is written.
            etag = (await self._objects.head(key)).etag
            return await self._objects.record(key, TagRecord.from_json), etag
        return None, etag

    async def tag_record(self, name: str, tag: str) -> TagRecord | None:
        """None if there is none. Raises DigestMismatch if it can't be read."""
        with suppress(NotFound):
            return await self._objects.record(layout.tag(name, tag), TagRecord.from_json)
        return None

    async def tags(self, name: str) -> dict[str, int]:
        return {tag: record.version for tag, record in (await self.tag_records(name)).items()}

    async def tag_records(self, name: str) -> dict[str, TagRecord]:
        tags = {layout.tag(name, tag): tag for tag in await self.tag_names(name)}
        found = await self._objects.records("tag", tags, lambda _, content: TagRecord.from_json(content))
        return {tags[key]: record for key, record in found.items()}

    async def tag_names(self, name: str) -> list[str]:
        """Also of those whose record can't be read."""
        keys = await self._objects.keys_here(layout.tags(name))
        return [match["tag"] for key in keys if (match := layout.TAG.fullmatch(key)) and match["name"] == name]

    # Names

    async def names(self) -> list[str]:
        """Names that have at least one durable version or a tombstone."""
        keys = await self._objects.keys(layout.CARTRIDGES)
        return sorted({match["name"] for key in keys if (match := layout.MANIFEST.fullmatch(key))})

    async def delete_name(self, name: str, versions: Iterable[int]) -> bool:
        """Delete these versions and all tags; False if there were none. Limits stay."""
        # Tags first: a tag must not outlive its version.
        tags = [key for key in await self._objects.keys_here(layout.tags(name)) if layout.TAG.fullmatch(key)]
        manifests = [layout.manifest(name, version) for version in versions]
        for key in [*tags, *manifests]:
            await self._objects.delete(key)
        return bool(manifests)

    # Numbers

    async def raise_limit(self, name: str, counter: int) -> int:
        """Allow numbers beyond `counter`. Each limit is an object of its own: a late writer can't lower it."""
        limit = (counter // LIMIT_STEP + 1) * LIMIT_STEP
        await self._objects.put_if_absent(layout.limit(name, limit), b"")
        if counter >= LIMIT_STEP:
            await self._objects.delete(layout.limit(name, limit - LIMIT_STEP))
        return limit

    async def limits(self) -> dict[str, int]:
        """The highest limit of every name that ever was."""
        limits: dict[str, int] = {}
        for key in await self._objects.keys(layout.COUNTERS):
            if match := layout.LIMIT.fullmatch(key):
                limits[match["name"]] = max(limits.get(match["name"], 0), int(match["limit"]))
        return limits

    async def versions(self, name: str) -> list[int]:
        """Numbers of manifests and tombstones, ascending."""
        keys = await self._objects.keys_here(layout.versions(name))
        return sorted(int(match["version"]) for key in keys if (match := layout.MANIFEST.fullmatch(key)))

    async def _manifest(self, key: str) -> Manifest | None:
        return await self._objects.record(key, partial(_manifest_at, key))


def _manifest_at(key: str, content: bytes) -> Manifest | None:
    """None for a tombstone. Raises InvalidArgument if it is damaged, or another version's."""
    if content == json.dumps(_TOMBSTONE).encode():
        return None
    manifest = Manifest.from_json(content)
    if key != layout.manifest(manifest.name, manifest.version):
        raise InvalidArgument(f"{key} holds the manifest of {manifest.id}")
    return manifest
