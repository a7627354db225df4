"""Pointers in Redis: which versions a name has, who may publish, what `latest` and the tags mean.

Every method is one atomic script. All raise StoreUnavailable when Redis can't be reached.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

from foundry.errors import CartridgeNotFound, Conflict, DigestMismatch, Fenced, InvalidArgument
from foundry.identity import check_digest
from foundry.store.manifest import Manifest, ManifestDraft
from foundry.store.names import LATEST, CartridgeId, Reference, check_name, parse_version
from foundry.store.redis import hot_bytes as hot
from foundry.store.redis.connection import RESTORE, Connection, Reply
from foundry.store.redis.keys import key
from foundry.store.tags import MAX_TAG_HISTORY, TagRecord
from foundry.store.unreadable import damaged_version, reading, skipped
from foundry.telemetry.traces import current_traceparent
from foundry.untrusted import parse_count


@dataclass(frozen=True, slots=True)
class Reservation:
    """A version number that only this publisher may fill; `committed` if it did so before."""

    version: int
    committed: Manifest | None


@dataclass(frozen=True, slots=True)
class LimitReached:
    """No number may be handed out beyond `counter` until object storage has a higher limit."""

    counter: int


@dataclass(frozen=True, slots=True)
class Published:
    """A version became visible. A hint to prefetch: losing one costs time, never correctness."""

    event_id: str
    cartridge: CartridgeId
    run: str
    step: int
    # Of the publication; "" if nobody traced it.
    traceparent: str = ""


class Commit(Enum):
    """How a commit ended; but for DONE nothing changed."""

    DONE = "ok"
    RESERVATION_LOST = "unreserved"
    BYTES_LOST = "incomplete"


class Pointers:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def acquire(self, name: str, run: str, attempt: int, *, hold_seconds: float | None = None) -> list[int]:
        """Become the owner. The reply: versions that earlier owners reserved and may have left manifests for.

        After `hold_seconds` another may become it; without them only when the owner released the name.
        """
        hold_ms = "" if hold_seconds is None else int(hold_seconds * 1000)
        reply = await self._connection.run("pointers/acquire", name, run, attempt, hold_ms)
        _refuse_fenced(reply, name, run, attempt)
        if reply[0] == "conflict":
            raise Conflict(f"cartridge {name} is being trained by run {reply[1]}", field="name")
        return [version for each in reply[1] for version in _version_if_whole(each, key("pending", name))]

    async def forget(self, name: str, version: int) -> None:
        """Drop the reservation and whatever points to a version whose manifest was withdrawn or deleted."""
        await self._connection.run("pointers/forget", name, version, 0)

    async def release(self, name: str, run: str, attempt: int) -> None:
        reply = await self._connection.run("pointers/release", name, run, attempt)
        _refuse_fenced(reply, name, run, attempt)

    async def check_owner(self, draft: ManifestDraft) -> None:
        """Raises Fenced unless the caller is the owner."""
        reply = await self._connection.run("pointers/check_owner", draft.name, draft.run, draft.attempt)
        _refuse_fenced(reply, draft.name, draft.run, draft.attempt)

    async def reserve(self, draft: ManifestDraft, digest: str, *, durable: bool) -> Reservation | LimitReached | None:
        """The same run, step and digest get the same number again; None while the collector deletes the blob.

        Raises Fenced unless the caller is the owner.
        """
        reply = await self._connection.run(
            "pointers/reserve", draft.name, draft.run, draft.attempt, draft.step, digest, int(durable)
        )
        _refuse_fenced(reply, draft.name, draft.run, draft.attempt)
        if reply[0] == "marked":
            return None
        if reply[0] == "limit":
            return LimitReached(_count(reply[1], key("name", draft.name)))
        version = _version(reply[1], key("name", draft.name))
        committed = _manifest(draft.name, version, reply[2]) if reply[0] == "committed" else None
        return Reservation(version, committed)

    async def raise_limit(self, name: str, limit: int) -> None:
        await self._connection.run("pointers/raise_limit", name, limit)

    async def commit(
        self, manifest: Manifest, token: str, *, durable: bool, keep_hot: int, event_stream_length: int
    ) -> Commit:
        """Give the bytes staged under `token` their digest, make the version visible, move `latest` forward, announce
        it, trim older hot bytes: all in one step.

        Raises Fenced unless the caller is the owner.
        """
        reply = await self._connection.run(
            "pointers/commit",
            manifest.name,
            manifest.run,
            manifest.attempt,
            manifest.step,
            manifest.digest,
            int(durable),
            manifest.version,
            manifest.to_json(),
            keep_hot,
            event_stream_length,
            token,
            hot.meta(manifest.header),
            current_traceparent(),
        )
        _refuse_fenced(reply, manifest.name, manifest.run, manifest.attempt)
        return Commit(reply[0])

    async def lookup(self, reference: Reference) -> CartridgeId:
        selector = reference.selector
        if isinstance(selector, int):
            kind = "version"
        elif reference.immutable:
            kind = "digest"
        else:
            kind = "latest" if selector == LATEST else "tag"
        reply = await self._connection.run("pointers/lookup", reference.name, kind, selector)
        if reply[0] == "missing":
            raise CartridgeNotFound(f"there is no cartridge {reference}", field="model")
        if reply[0] == "damaged":
            raise damaged_version(reference, _version(reply[1], key("damaged", reference.name)))
        if reply[0] == "dangling":
            raise DigestMismatch(f"{reference} means version {reply[1]} in Redis, which is not there. {RESTORE}")
        versions = key("versions", reference.name)
        with reading(f"{versions} in Redis"):
            return CartridgeId(reference.name, parse_version(reply[1]), check_digest(reply[2]))

    async def names(self) -> list[str]:
        found = []
        for name in sorted(await self._connection.read("SMEMBERS", key("names"))):
            with skipped("pointer", key("names")), reading(f"{key('names')} in Redis"):
                found.append(check_name(name))
        return found

    async def manifest(self, name: str, version: int) -> Manifest:
        value = await self._connection.read("HGET", key("versions", name), version)
        if value is None:
            raise CartridgeNotFound(f"there is no cartridge {name}@{version}", field="version")
        return _manifest(name, version, value)

    async def manifests(self, name: str) -> list[Manifest]:
        """Those that can be read."""
        found = []
        for version, value in await self._pairs(key("versions", name)):
            with skipped("pointer", f"{key('versions', name)} {version}"):
                found.append(_manifest(name, _version(version, key("versions", name)), value))
        return sorted(found, key=lambda manifest: manifest.version)

    async def check(self, name: str) -> None:
        """Read all that Redis says of a name. Raises DigestMismatch if a part of it is damaged."""
        pointers: list[str] = [LATEST]
        for tag, _ in await self._pairs(key("tags", name)):
            pointers.append(tag)
        for version, value in await self._pairs(key("versions", name)):
            _manifest(name, _version(version, key("versions", name)), value)
        for pointer in pointers:
            with suppress(CartridgeNotFound):
                await self.lookup(Reference(name, pointer))

    async def keys_of_wrong_type(self) -> AsyncIterator[str]:
        cursor = "0"
        while True:
            _, cursor, keys = await self._connection.run("verify/types", cursor)
            for each in keys:
                yield each
            if cursor == "0":
                return

    async def durable(self, name: str) -> set[int]:
        return await self._versions("SMEMBERS", key("durable", name))

    async def tags(self, name: str) -> dict[str, int]:
        found = {}
        for tag, text in await self._pairs(key("tags", name)):
            for version in _version_if_whole(text, key("tags", name)):
                found[tag] = version
        return found

    async def hot(self, name: str) -> set[int]:
        return await self._versions("ZRANGE", key("hot", name), 0, -1)

    async def mark_durable(self, name: str, version: int) -> bool:
        """False if the version is gone."""
        return bool((await self._connection.run("pointers/mark_durable", name, version))[0] == "ok")

    async def tag(self, name: str, tag: str, version: int) -> int | None:
        """What the tag meant before."""
        reply = await self._connection.run("pointers/tag", name, tag, version, MAX_TAG_HISTORY)
        if reply[0] == "missing":
            raise CartridgeNotFound(f"there is no cartridge {name}@{version}", field="version")
        return _version(reply[1], key("tags", name)) if reply[1] else None

    async def rollback_tag(self, name: str, tag: str) -> tuple[int, int]:
        """What the tag means now and what it meant until now. Raises Conflict if there is no version to go back to."""
        reply = await self._connection.run("pointers/rollback_tag", name, tag, MAX_TAG_HISTORY)
        if reply[0] == "missing":
            raise CartridgeNotFound(f"cartridge {name} has no tag {tag}", field="tag")
        if reply[0] == "first":
            raise Conflict(
                f"{name}@{tag} can't go back: version {reply[1]} is the first it ever meant, of those that still exist",
                field="tag",
            )
        return _version(reply[1], key("tags", name)), _version(reply[2], key("tags", name))

    async def tag_record(self, name: str, tag: str) -> TagRecord | None:
        reply = await self._connection.run("pointers/tag_record", name, tag)
        if reply[0] == "missing":
            return None
        with reading(f"{key('tag-history', name)} {tag} in Redis"):
            moved_ms, *history = map(parse_count, reply[2].split())
            return TagRecord(version=parse_version(reply[1]), history=tuple(history), moved_ms=moved_ms)

    async def untag(self, name: str, tag: str) -> None:
        if (await self._connection.run("pointers/untag", name, tag))[0] == "missing":
            raise CartridgeNotFound(f"cartridge {name} has no tag {tag}", field="tag")

    async def delete_version(self, name: str, version: int) -> bool:
        """False if Redis has no such version. Raises Conflict while something points to it."""
        reply = await self._connection.run("pointers/delete_version", name, version)
        if reply[0] == "conflict":
            raise Conflict(f"{name}@{version} is what {name}@{reply[1]} means: move that first", field="version")
        return bool(reply[0] == "ok")

    async def delete_name(self, name: str) -> bool:
        """False if Redis has no such name. Raises Conflict while a run trains it."""
        reply = await self._connection.run("pointers/delete_name", name)
        if reply[0] == "conflict":
            raise Conflict(f"cartridge {name} is being trained by run {reply[1]}: cancel that first", field="name")
        return bool(reply[0] == "ok")

    async def lease(self, digest: str, holder: str, seconds: float) -> bool:
        """False while the collector deletes the blob."""
        reply = await self._connection.run("pointers/lease", digest, holder, int(seconds * 1000))
        return bool(reply[0] == "ok")

    async def unlease(self, digest: str, holder: str) -> None:
        await self._connection.run("pointers/unlease", digest, holder)

    async def leases(self, digest: str) -> list[str]:
        return list((await self._connection.run("pointers/leases", digest))[1])

    async def drop_bytes(self, digest: str) -> None:
        await self._connection.run("pointers/drop_bytes", digest)

    async def drop_staged(self, token: str, num_chunks: int) -> None:
        await self._connection.run("pointers/drop_staged", token, num_chunks)

    async def hot_digests(self) -> AsyncIterator[str]:
        """Digests whose bytes some version keeps in Redis; one may come twice."""
        cursor = "0"
        while True:
            cursor, keys = await self._connection.read("SCAN", cursor, "MATCH", key("refs", "*"), "COUNT", 1000)
            for each in keys:
                digest = None
                with skipped("pointer", each), reading(f"{each} in Redis"):
                    digest = check_digest(each.removeprefix(key("refs", "")))
                if digest:
                    yield digest
            if cursor == "0":
                return

    async def hot_versions(self, digest: str) -> list[str]:
        """`name@version` of the versions that keep these bytes in Redis."""
        return sorted(await self._connection.read("SMEMBERS", key("refs", digest)))

    async def events(self, after: str) -> AsyncIterator[Published]:
        if after == "$":
            # Pinned now: "$" in every read would skip what is published between two reads.
            newest = await self._connection.read("XREVRANGE", key("events"), "+", "-", "COUNT", 1)
            after = newest[0][0] if newest else "0-0"
        while True:
            for event_id, fields in await self._connection.read_stream(key("events"), after, block=True):
                after = event_id
                published = None
                with skipped("pointer", f"{key('events')} {event_id}"), reading(f"{key('events')} in Redis"):
                    published = _published(event_id, fields)
                if published:
                    yield published

    async def _versions(self, command: str, at: str, *args: int) -> set[int]:
        texts = await self._connection.read(command, at, *args)
        return {version for text in texts for version in _version_if_whole(text, at)}

    async def _pairs(self, at: str) -> Iterable[tuple[str, str]]:
        """Of a hash."""
        flat = await self._connection.read("HGETALL", at)
        return zip(flat[::2], flat[1::2], strict=True)


def versions_value(manifest: Manifest) -> str:
    """A manifest as the hash `foundry:versions:<name>` holds it."""
    return f"{manifest.digest} {manifest.to_json()}"


def _manifest(name: str, version: int, value: str) -> Manifest:
    """Raises DigestMismatch."""
    with reading(f"{key('versions', name)} {version} in Redis"):
        digest, _, text = value.partition(" ")
        manifest = Manifest.from_json(text)
        if manifest.id != CartridgeId(name, version, digest):
            raise InvalidArgument(f"it is the manifest of {manifest.id}, {manifest.digest}")
        return manifest


def _published(event_id: str, fields: Mapping[str, str]) -> Published:
    name, version, digest = fields["name"], parse_version(fields["version"]), check_digest(fields["digest"])
    cartridge = CartridgeId(check_name(name), version, digest)
    return Published(event_id, cartridge, fields["run"], parse_count(fields["step"]), fields.get("traceparent", ""))


def _version(text: str, at: str) -> int:
    with reading(f"{at} in Redis"):
        return parse_version(text)


def _count(text: str, at: str) -> int:
    with reading(f"{at} in Redis"):
        return parse_count(text)


def _version_if_whole(text: str, at: str) -> Iterable[int]:
    """Nothing, where one among many is none."""
    with skipped("pointer", at):
        return (_version(text, at),)
    return ()


def _refuse_fenced(reply: Reply, name: str, run: str, attempt: int) -> None:
    if reply[0] != "fenced":
        return
    if not reply[1]:
        raise Fenced(f"run {run} attempt {attempt} does not hold cartridge {name}: nobody does, acquire it first")
    raise Fenced(f"run {run} attempt {attempt} does not hold cartridge {name}: run {reply[1]} attempt {reply[2]} does")
