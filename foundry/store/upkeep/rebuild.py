"""Restoring Redis from object storage after it was emptied, restarted or replaced.

Until the epoch is set, every script that reads or changes pointers refuses, so nothing moves underneath. Several
processes may restore at once: each step only brings Redis closer to what object storage says. They share a token, which
stands where the epoch will; each step asks for it, and the last one replaces it. A Redis that is emptied or replaced
meanwhile has lost it: then the rebuild is over, nothing that was read for it is written any more (much may have been
published in between), and another begins.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass

import structlog

from foundry.errors import StoreUnavailable
from foundry.store import metrics
from foundry.store.manifest import Manifest
from foundry.store.names import check_name
from foundry.store.objects.versions import Durable
from foundry.store.redis.connection import Connection
from foundry.store.redis.pointers import versions_value
from foundry.store.runs import RunStore
from foundry.store.unreadable import reading, skipped
from foundry.store.upkeep.marks import MARK_SECONDS, GcMarks

log = structlog.get_logger(__name__)

# Begun at most so often; each but the last was ended by one more loss.
_MAX_REBUILDS = 5


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What was restored. Runs are those that are not over."""

    num_names: int
    num_versions: int
    num_runs: int


async def drop_epoch(connection: Connection) -> None:
    """Redis counts as emptied from now on, whatever it holds."""
    await connection.run_restoring("rebuild/drop_epoch")


async def rebuild(connection: Connection, durable: Durable, marks: GcMarks, runs: RunStore) -> Rebuilt | None:
    """Restore pointers, counters, tags and unfinished runs. None if there was nothing to restore.

    Versions that were only hot are lost with Redis; their numbers are not used again. A durable version whose owner
    died between manifest and pointer is whole, and is visible from then on. One that can't be read, or whose blob is
    gone, is left out, and noted as damaged: no pointer may name bytes that nobody has, nor pass over them in silence.
    Raises StoreUnavailable if Redis or the object storage can't be reached, or Redis is emptied over and over.
    """
    for _ in range(_MAX_REBUILDS):
        begin = await connection.run_restoring("rebuild/begin", uuid.uuid4().hex)
        if begin[0] == "restored":
            return None
        token = begin[1]
        known = await _swept_names(connection, token)
        # What is marked later is marked in the Redis that is being restored.
        condemned, all_known = await marks.digests()
        blobs = {digest async for digest, _ in durable.blobs.entries()}
        limits = await durable.limits()
        names = sorted({*known, *await durable.names(), *limits})
        num_versions = 0
        needed: set[str] = set()
        for name in names:
            read, damaged = await durable.whole_and_damaged(name)
            manifests = [each for each in read if await _has_blob(each, durable, blobs)]
            damaged |= {each.version for each in read} - {each.version for each in manifests}
            tags = await durable.tag_records(name)
            truth = _truth(manifests, {tag: record.version for tag, record in tags.items()}, damaged)
            # A version above the limit can only come from a store that was copied by hand; its number is taken too.
            limit = max(limits.get(name, 0), *damaged, *(manifest.version for manifest in manifests), 0)
            await connection.run_restoring("rebuild/name", token, name, limit, truth)
            histories = {tag: " ".join(map(str, (record.moved_ms, *record.history))) for tag, record in tags.items()}
            await connection.run_restoring("rebuild/tag_history", token, name, json.dumps(histories))
            num_versions += len(manifests)
            needed.update(manifest.digest for manifest in manifests)
        if not all_known:
            # A record that can't be read may have been of any blob that a collector takes for garbage.
            condemned |= blobs - needed
        if condemned:
            await connection.run_restoring("rebuild/marks", token, int(MARK_SECONDS * 1000), *sorted(condemned))
        num_runs = await runs.restore(token)
        if (await connection.run_restoring("rebuild/finish", token))[0] == "ok":
            metrics.REBUILDS.inc()
            log.info("pointers_restored", num_names=len(names), num_versions=num_versions, num_unfinished_runs=num_runs)
            return Rebuilt(len(names), num_versions, num_runs)
    raise StoreUnavailable("Redis was emptied again and again while its pointers were being restored")


async def _swept_names(connection: Connection, token: str) -> set[str]:
    """Names that Redis still knows, once keys of a wrong type are out of the way."""
    names: set[str] = set()
    cursor = "0"
    while True:
        reply = await connection.run_restoring("rebuild/sweep", token, cursor)
        if reply[0] == "over":
            # As every other step will find.
            return names
        _, cursor, gone, found = reply
        for key in gone:
            log.error("key_replaced", key=key, error="it was of another type than we give it")
        for name in found:
            with skipped("pointer", "foundry:name"), reading("a name in Redis"):
                names.add(check_name(name))
        if cursor == "0":
            return names


async def _has_blob(manifest: Manifest, durable: Durable, blobs: set[str]) -> bool:
    # Asked again, because it may have been written since the listing.
    if manifest.digest in blobs or await durable.blobs.exists(manifest.digest):
        return True
    log.error("version_without_blob", cartridge=str(manifest.id), digest=manifest.digest)
    return False


def _truth(manifests: list[Manifest], tags: dict[str, int], damaged: set[int]) -> str:
    return json.dumps(
        {
            "versions": {str(manifest.version): versions_value(manifest) for manifest in manifests},
            "steps": {f"{each.run} {each.step}": f"{each.version} {each.digest}" for each in manifests},
            "tags": {tag: str(version) for tag, version in tags.items()},
            "damaged": [str(version) for version in sorted(damaged)],
        }
    )
