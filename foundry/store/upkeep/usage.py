"""How much the store holds, in all and of each tenant: a look at Redis in short steps, a listing of the blobs and one
of the documents."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from foundry.errors import DigestMismatch
from foundry.store.objects import layout
from foundry.store.objects.objects import Objects
from foundry.store.objects.versions import Durable
from foundry.store.redis.connection import RESTORE, Connection
from foundry.store.redis.hot_bytes import header_of
from foundry.store.redis.pointers import Pointers
from foundry.store.unreadable import skipped

# Names in one step of Redis, which does nothing else meanwhile.
_NAMES_AT_A_TIME = 100


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts, and sizes in bytes. Versions of equal bytes share them."""

    names: int
    hot_versions: int
    hot_bytes: int
    durable_versions: int
    durable_bytes: int
    redis_used_bytes: int
    # 0: no limit.
    redis_max_bytes: int
    # Of each tenant's documents, files and durable versions, also those that another tenant has too.
    tenant_bytes: Mapping[str, int]
    queued_runs: int
    held_runs: int


async def take_usage(connection: Connection, pointers: Pointers, durable: Durable, objects: Objects) -> Usage:
    """Raises StoreUnavailable. What is published or removed meanwhile may be counted or not."""
    names = await pointers.names()
    hot_bytes: dict[str, int] = {}
    durable_digests: dict[str, set[str]] = defaultdict(set)
    hot_versions = durable_versions = 0
    for begin in range(0, len(names), _NAMES_AT_A_TIME):
        some = names[begin : begin + _NAMES_AT_A_TIME]
        _, durable_here, num_hot, kept, damaged = await connection.run("usage/count", *some)
        hot_versions += num_hot
        for name, digests in durable_here:
            durable_versions += len(digests)
            durable_digests[name.rpartition("/")[0]].update(digests)
        for name in damaged:
            with skipped("pointer", name):
                raise DigestMismatch(f"what Redis holds of {name} is damaged. {RESTORE}")
        for digest, meta in kept:
            with skipped("cartridge", digest):
                hot_bytes[digest] = header_of(digest, meta).num_bytes
    blob_bytes = {digest: entry.size async for digest, entry in durable.blobs.entries()}
    tenant_bytes: Counter[str] = Counter()
    for tenant, digests in durable_digests.items():
        tenant_bytes[tenant] = sum(blob_bytes.get(digest, 0) for digest in digests)
    async for entry in objects.scan(layout.DOCUMENTS):
        if match := layout.TEXT.fullmatch(entry.key):
            tenant_bytes[match["tenant"] or ""] += entry.size
    async for entry in objects.scan(layout.FILES):
        if match := layout.FILE_PART.fullmatch(entry.key):
            tenant_bytes[match["owner"].removeprefix("-")] += entry.size
    _, used_bytes, max_bytes, queued, held = await connection.run("usage/server")
    return Usage(
        names=len(names),
        hot_versions=hot_versions,
        hot_bytes=sum(hot_bytes.values()),
        durable_versions=durable_versions,
        durable_bytes=sum(blob_bytes.values()),
        tenant_bytes=tenant_bytes,
        redis_used_bytes=int(used_bytes),
        redis_max_bytes=int(max_bytes),
        queued_runs=queued,
        held_runs=held,
    )
