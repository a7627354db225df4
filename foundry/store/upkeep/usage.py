"""How much the store holds, for those who run it: a look at Redis in short steps, and one listing of the blobs."""

from __future__ import annotations

from dataclasses import dataclass

from foundry.errors import DigestMismatch
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
    queued_runs: int
    held_runs: int


async def take_usage(connection: Connection, pointers: Pointers, durable: Durable) -> Usage:
    """Raises StoreUnavailable. What is published or removed meanwhile may be counted or not."""
    names = await pointers.names()
    hot_bytes: dict[str, int] = {}
    hot_versions = durable_versions = 0
    for begin in range(0, len(names), _NAMES_AT_A_TIME):
        some = names[begin : begin + _NAMES_AT_A_TIME]
        _, num_durable, num_hot, kept, damaged = await connection.run("usage/count", *some)
        durable_versions, hot_versions = durable_versions + num_durable, hot_versions + num_hot
        for name in damaged:
            with skipped("pointer", name):
                raise DigestMismatch(f"what Redis holds of {name} is damaged. {RESTORE}")
        for digest, meta in kept:
            with skipped("cartridge", digest):
                hot_bytes[digest] = header_of(digest, meta).num_bytes
    _, used_bytes, max_bytes, queued, held = await connection.run("usage/server")
    return Usage(
        names=len(names),
        hot_versions=hot_versions,
        hot_bytes=sum(hot_bytes.values()),
        durable_versions=durable_versions,
        durable_bytes=sum([entry.size async for _, entry in durable.blobs.entries()]),
        redis_used_bytes=int(used_bytes),
        redis_max_bytes=int(max_bytes),
        queued_runs=queued,
        held_runs=held,
    )
