"""The store of cartridges: versions that never change, pointers that only fenced owners move.

Object storage holds the truth (objects/), Redis the pointers and the bytes of the newest versions (redis/). While Redis
is reachable it knows every version; when it is not, object storage answers for the durable ones.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TypeVar

import structlog
from redis.asyncio import Redis

from foundry.errors import CartridgeNotFound, InvalidArgument, StoreRefused, StoreUnavailable
from foundry.identity import CartridgeBytes, CartridgeHeader, check_digest
from foundry.store import metrics
from foundry.store.batches import BatchStore
from foundry.store.credentials import RedisAccess, S3Access
from foundry.store.datasets import DatasetStore
from foundry.store.delete_document import delete_document
from foundry.store.documents import DocumentStore
from foundry.store.fetch import Fetcher
from foundry.store.files import FileStore
from foundry.store.grants import GrantStore
from foundry.store.key_store import KeyStore
from foundry.store.manifest import Manifest, ManifestDraft
from foundry.store.names import CartridgeId, Reference, check_name, check_new_name, check_run, check_tag, check_version
from foundry.store.objects.checkpoints import Checkpoints
from foundry.store.objects.objects import Objects
from foundry.store.objects.versions import Durable
from foundry.store.publish import Publisher
from foundry.store.redis.connection import Connection
from foundry.store.redis.hot_bytes import HotBytes
from foundry.store.redis.keys import key
from foundry.store.redis.pointers import Pointers, Published
from foundry.store.resolve import Resolver
from foundry.store.rollback import rollback
from foundry.store.runs import RunStore
from foundry.store.settings import StoreSettings
from foundry.store.signatures import Signer
from foundry.store.tags import TagRecord
from foundry.store.unreadable import skipped
from foundry.store.upkeep import rebuild
from foundry.store.upkeep.gc import Collector
from foundry.store.upkeep.gc_batches import BatchCollector
from foundry.store.upkeep.gc_records import RecordCollector
from foundry.store.upkeep.marks import GcMarks, while_marked
from foundry.store.upkeep.rebuild import Rebuilt
from foundry.store.upkeep.retention import Collected, Retention
from foundry.store.upkeep.sign import Signed, sign
from foundry.store.upkeep.usage import Usage, take_usage
from foundry.store.upkeep.verified import Verified
from foundry.store.upkeep.verify import Verifier
from foundry.store.upkeep.verify_records import RecordVerifier
from foundry.tasks import end

log = structlog.get_logger(__name__)

_LEASE_WHILE_COPYING_SECONDS = 600.0

T = TypeVar("T")


class CartridgeStore:
    """All methods raise StoreUnavailable when what they need can't be reached, and StoreFull when it takes no more."""

    def __init__(self, settings: StoreSettings) -> None:
        self.settings = settings
        self.objects = Objects.open(
            settings.objects_url,
            retry_seconds=settings.objects_retry_seconds,
            timeout_seconds=settings.objects_timeout_seconds,
            s3=S3Access.of(settings),
            signer=Signer.of(settings.signing_key_file),
        )
        self._connection = Connection(RedisAccess.of(settings), timeout_seconds=settings.redis_timeout_seconds)
        self._connection.on_empty = self.rebuild
        self._pointers = Pointers(self._connection)
        self._durable = Durable(self.objects, max_cartridge_bytes=settings.max_cartridge_bytes)
        self._marks = GcMarks(self.objects)
        self._hot = HotBytes(self._connection, max_cartridge_bytes=settings.max_cartridge_bytes)
        self._resolver = Resolver(self._pointers, self._durable)
        self._fetcher = Fetcher(self._pointers, self._durable.blobs, self._hot)
        self._publisher = Publisher(self._pointers, self._durable, self._hot, settings, self._keep)
        # Of the tenant "", as are the data sets: `of` gives another's.
        self.documents = DocumentStore(self.objects, max_document_bytes=settings.max_document_bytes)
        self.datasets = DatasetStore(self.objects)
        # Of the tenant "" too.
        self.files = FileStore(self.objects)
        self.batches = BatchStore(self.objects)
        self.api_keys = KeyStore(self.objects)
        self.grants = GrantStore(self.objects)
        self.runs = RunStore(self._connection, self.objects, settings)
        self._rebuild: asyncio.Task[Rebuilt | None] | None = None

    @classmethod
    async def open(cls, settings: StoreSettings) -> CartridgeStore:
        """Connect, and restore the pointers if Redis is empty.

        A Redis that can't be reached is no error here: durable versions can be read without it. Raises StoreRefused if
        Redis or the object storage does not take our credentials, which waiting would not change.
        """
        store = cls(settings)
        meetings: tuple[tuple[Callable[[], Awaitable[object]], str], ...] = (
            (store.objects.check, "store_opened_without_object_storage"),
            (store.rebuild, "store_opened_without_redis"),
        )
        for meet, without_it in meetings:
            try:
                await meet()
            except StoreRefused:
                await store.close()
                raise
            except StoreUnavailable as error:
                log.warning(without_it, error=error.message)
        return store

    @property
    def redis(self) -> Redis:
        """For keys that are none of the store's. Errors are redis-py's: `redis_errors` makes ours of them."""
        return self._connection.redis

    async def close(self) -> None:
        if self._rebuild is not None:
            await end(self._rebuild)
        await self._fetcher.close()
        self._hot.close()
        await self._connection.close()

    async def ping(self) -> None:
        """Raises StoreUnavailable unless Redis answers and its pointers are restored."""
        await self._connection.read("EXISTS", key("epoch"))

    async def rebuild(self, *, force: bool = False) -> Rebuilt | None:
        """Restore Redis from object storage if it was emptied, restarted or replaced; None if it was not.

        `force` does it in any case. Called by whatever meets an empty Redis; concurrent callers share one pass.
        """
        if force:
            await rebuild.drop_epoch(self._connection)
        if self._rebuild is None or self._rebuild.done():
            self._rebuild = asyncio.create_task(
                rebuild.rebuild(self._connection, self._durable, self._marks, self.runs)
            )
        return await asyncio.shield(self._rebuild)

    # Publishing

    async def acquire(self, name: str, run_id: str, attempt: int, *, hold_seconds: float | None = None) -> None:
        """Become the only publisher of `name`, until it is released or `hold_seconds` have passed; the same owner may
        ask again.

        Raises InvalidArgument for a name that none may have, Conflict while another run holds it, Fenced if a newer
        attempt of this run does.
        """
        withdrawn = await self._pointers.acquire(
            check_new_name(name), check_run(run_id), attempt, hold_seconds=hold_seconds
        )
        for version in withdrawn:
            # Our predecessor is fenced by now, but may be about to write this manifest.
            await self._durable.withdraw(name, version)
            await self._pointers.forget(name, version)

    async def release(self, name: str, run_id: str, attempt: int) -> None:
        """Let others publish. Raises Fenced if the caller is not the owner."""
        await self._pointers.release(check_name(name), run_id, attempt)

    async def publish(self, stored: CartridgeBytes, draft: ManifestDraft, *, durable: bool) -> Manifest:
        """Store the bytes, then the manifest, then move `latest` forward and announce the version.

        Repeating a publish (same run, step and digest) returns the version it made; if durable, its blob is written
        again, over one that may be damaged. Raises Fenced unless `draft.run` and `draft.attempt` hold the name. After
        an error nothing has become visible and the call may be repeated.
        """
        return await self._publisher.publish(stored, draft, durable=durable)

    # Reading

    async def resolve(self, reference: Reference | str) -> CartridgeId:
        """What a reference means now. The answer names version and digest, so that nobody is misled.

        Without Redis: a version or digest resolves from this process's memory or from object storage; `latest` and
        tags mean what they last meant to this process (logged with its age), else what object storage says, for
        `latest` the highest durable version. Raises CartridgeNotFound if there is no such cartridge, StoreUnavailable
        if that can't be known without Redis.
        """
        if isinstance(reference, str):
            reference = Reference.parse(reference)
        return await self._resolver.resolve(reference)

    async def header(self, digest: str) -> CartridgeHeader:
        """What the copy of `digest` says it is, unverified: how much room its bytes need, without moving them.

        Raises CartridgeNotFound if no copy is left, DigestMismatch if every copy is corrupt.
        """
        return await self._fetcher.header(check_digest(digest))

    async def fetch(self, digest: str) -> CartridgeBytes:
        """The bytes that `digest` names, verified. Concurrent fetches of one digest share one transfer.

        Raises CartridgeNotFound if no copy is left, DigestMismatch if every copy is corrupt.
        """
        return await self._fetcher.fetch(check_digest(digest))

    async def manifest(self, name: str, version: int) -> Manifest:
        """Raises CartridgeNotFound."""
        check_version(version)
        return await _or_durable(
            self._pointers.manifest(check_name(name), version), lambda: self._durable.manifest(name, version)
        )

    async def versions(self, name: str) -> list[Manifest]:
        """All versions, oldest first; without Redis only the durable ones."""
        return await _or_durable(self._pointers.manifests(check_name(name)), lambda: self._durable.manifests(name))

    async def durable_versions(self, name: str) -> set[int]:
        """The versions that would survive a loss of Redis."""
        return await _or_durable(self._pointers.durable(check_name(name)), lambda: self._durable.whole_versions(name))

    async def hot_versions(self, name: str) -> set[int]:
        """The versions whose bytes are in Redis; none without Redis."""
        try:
            return await self._pointers.hot(check_name(name))
        except StoreUnavailable:
            return set()

    async def names(self) -> list[str]:
        """All cartridge names; without Redis' set of them only those with a durable version."""
        with skipped("pointer", key("names")):
            return await _or_durable(self._pointers.names(), self._durable.names)
        return await self._durable.names()

    async def tags(self, name: str) -> dict[str, int]:
        """Tag to version, without `latest`."""
        return await _or_durable(self._pointers.tags(check_name(name)), lambda: self._durable.tags(name))

    async def tag_record(self, name: str, tag: str) -> TagRecord:
        """What a tag means and meant before. Raises CartridgeNotFound."""
        record = await _or_durable(
            self._pointers.tag_record(check_name(name), check_tag(tag)), lambda: self._durable.tag_record(name, tag)
        )
        if record is None:
            raise CartridgeNotFound(f"cartridge {name} has no tag {tag}", field="tag")
        return record

    def subscribe(self, last_id: str = "$") -> AsyncIterator[Published]:
        """Versions as they are published, after the event `last_id` ("$": from now, "0-0": all that are kept).

        Ends only with StoreUnavailable; subscribe again with the last event's id. A hint to prefetch, nothing more.
        """
        return self._pointers.events(last_id)

    # Changing what exists

    async def make_durable(self, name: str, version: int) -> None:
        """Copy a hot version to object storage. Raises CartridgeNotFound."""
        manifest = await self._pointers.manifest(check_name(name), check_version(version))
        if version in await self._pointers.durable(name):
            return
        await self._keep(manifest, None)

    async def _keep(self, manifest: Manifest, stored: CartridgeBytes | None) -> None:
        """Write a version's blob and manifest; with no bytes at hand those that the store has."""
        # Trimming would otherwise forget the version while it is copied.
        async with self.leased(manifest.digest, f"make-durable-{uuid.uuid4()}", _LEASE_WHILE_COPYING_SECONDS):
            await self._durable.blobs.put(manifest.digest, stored or await self.fetch(manifest.digest))
            await self._durable.put_manifest(manifest)
            if not await self._pointers.mark_durable(manifest.name, manifest.version):
                await self._durable.delete_manifest(manifest.name, manifest.version)
                raise CartridgeNotFound(f"cartridge {manifest.id} was deleted meanwhile", field="version")

    async def tag(self, name: str, tag: str, version: int) -> int | None:
        """Point a tag at a version, which becomes durable. Returns what it meant before. Raises CartridgeNotFound."""
        check_tag(tag)
        await self.make_durable(name, version)
        before = await self._pointers.tag(name, tag, version)
        await self._settle_tag(name, tag)
        return before

    async def rollback_tag(self, name: str, tag: str) -> tuple[int, int]:
        """Let a tag mean what it meant before; again for the one before that. Returns (version now, version until now).

        Raises CartridgeNotFound if there is no such tag, Conflict if no version is left that it meant before.
        """
        now, before = await self._pointers.rollback_tag(check_name(name), check_tag(tag))
        await self._settle_tag(name, tag)
        return now, before

    async def rollback(self, name: str, to: Reference) -> Manifest:
        """Publish the bytes that `to` means as a new version: `latest` only goes forward. What is known about the old
        version is carried over; the parent is what was latest.

        Raises CartridgeNotFound, and Conflict while a run holds the name or if latest has those bytes already.
        """
        return await rollback(self, name, to)

    async def untag(self, name: str, tag: str) -> None:
        """Raises CartridgeNotFound if there is no such tag."""
        await self._pointers.untag(check_name(name), check_tag(tag))
        await self._settle_tag(name, tag)

    async def _settle_tag(self, name: str, tag: str) -> None:
        """Make object storage agree with Redis, which decides the order of concurrent changes."""
        while True:
            # In this order: what another writes after the first of these reads is not written over.
            written, etag = await self._durable.tag(name, tag)
            record = await self._pointers.tag_record(name, tag)
            if record == written:
                return
            if record is None:
                await self._durable.delete_tag(name, tag)
            else:
                await self._durable.put_tag(name, tag, record, etag)

    async def delete(self, name: str, version: int | None = None) -> None:
        """Delete a version, or the name with all its versions, tags and grants. Blobs are left to `gc`.

        Raises CartridgeNotFound; Conflict for a version that `latest` or a tag means and for a name that a run holds.
        """
        check_name(name)
        # Redis first: it refuses, and a crash in between leaves a version that can be deleted again.
        if version is None:
            # Listed before others may take the name: what they publish is not deleted.
            versions = await self._durable.versions(name)
            known = await self._pointers.delete_name(name)
            # Before the versions: what a crash leaves of the name is granted to nobody.
            await self.grants.delete_name(name)
            known = await self._durable.delete_name(name, versions) or known
            for each in versions:
                await self._pointers.forget(name, each)
        else:
            known = await self._pointers.delete_version(name, check_version(version))
            known = await self._durable.delete_manifest(name, version) or known
            # A rebuild that read the manifest before it went has made a pointer to it.
            await self._pointers.forget(name, version)
        if not known:
            raise CartridgeNotFound(f"there is no cartridge {name}" + (f"@{version}" if version else ""), field="name")
        self._resolver.forget(name)

    async def delete_document(self, digest: str, *, tenant: str = "") -> None:
        """Delete a document of `tenant`; one that is not there is deleted already. What was trained on it stays.

        Raises Conflict while a run that is not over needs it.
        """
        await delete_document(self, check_digest(digest), tenant)

    # Leases

    async def lease(self, digest: str, holder: str, seconds: float) -> None:
        """Keep the bytes of `digest` from being collected for `seconds`; asking again extends it.

        Waits while the collector deletes the blob of that digest, which nothing needed until now.
        """
        if seconds <= 0:
            raise InvalidArgument(f"a lease must be longer than 0 seconds, not {seconds}", field="seconds")
        check_digest(digest)

        async def ask() -> bool | None:
            return await self._pointers.lease(digest, holder, seconds) or None

        await while_marked(digest, ask)

    async def unlease(self, digest: str, holder: str) -> None:
        await self._pointers.unlease(check_digest(digest), holder)

    async def leases(self, digest: str) -> list[str]:
        """Who holds a lease on `digest` now."""
        return await self._pointers.leases(check_digest(digest))

    @asynccontextmanager
    async def leased(self, digest: str, holder: str, seconds: float) -> AsyncIterator[None]:
        await self.lease(digest, holder, seconds)
        metrics.LEASES.inc()
        try:
            yield
        finally:
            metrics.LEASES.dec()
            await self.unlease(digest, holder)

    # Upkeep

    async def usage(self) -> Usage:
        """How much is kept where. Needs Redis; costs it a few milliseconds for each 100 names, and two listings."""
        return await take_usage(self._connection, self._pointers, self._durable, self.objects)

    def gc(
        self, *, keep_last: int | None = None, max_age_days: float | None = None, dry_run: bool = False
    ) -> AsyncIterator[Collected]:
        """Remove what nothing needs, and yield it; with `dry_run` only yield it. The limits default to the settings'.

        Needs Redis. May be stopped at any point and run again. Raises DigestMismatch, after the rest is done, if a
        manifest can't be read: then no blob or document goes; or a run: then no document.
        """
        settings = self.settings
        retention = Retention(
            keep_last=settings.keep_durable if keep_last is None else keep_last,
            max_age_days=settings.keep_durable_days if max_age_days is None else max_age_days,
            keep_runs_days=settings.keep_runs_days,
            keep_documents_days=settings.keep_documents_days,
            grace_seconds=settings.sweep_grace_seconds,
            keep_hot=settings.keep_hot,
        )
        began = datetime.now(UTC)
        stores = (self.objects, self.runs, self.documents, self.datasets)
        records = RecordCollector(*stores, retention, began=began, dry_run=dry_run)
        batches = BatchCollector(self.objects, began=began, old=retention.old(began), dry_run=dry_run)
        pointers = (self._connection, self._pointers, self._durable, self._marks)
        return Collector(*pointers, records, batches, retention, began=began, dry_run=dry_run).collect()

    def sign(self) -> AsyncIterator[Signed]:
        """Sign the records of object storage that no key of the store, or an older one, has signed; yields those that
        were, and those that can't be. Does without Redis. Raises InvalidArgument without a key."""
        return sign(self.objects)

    def verify(self) -> AsyncIterator[Verified]:
        """Read everything and hash it; yields what was looked at, good or bad. Needs Redis; changes nothing."""
        checkpoints = Checkpoints(self.objects)
        records = RecordVerifier(
            self.objects,
            self.documents,
            self.datasets,
            self.api_keys,
            self.grants,
            self.runs,
            checkpoints,
            self._marks,
        )
        grace_seconds = self.settings.sweep_grace_seconds
        return Verifier(self._pointers, self._durable, self._hot, records, grace_seconds=grace_seconds).verify()


async def _or_durable(pointers: Awaitable[T], durable: Callable[[], Awaitable[T]]) -> T:
    """What Redis says; while it is away, what object storage says, or StoreUnavailable for what that does not know."""
    try:
        return await pointers
    except StoreUnavailable as unavailable:
        try:
            return await durable()
        except CartridgeNotFound:
            # It may have been hot.
            raise unavailable from None
