"""The collector: what goes, what stays, and that a dry run says exactly what a real one does."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from foundry.errors import CartridgeNotFound, DigestMismatch, StoreUnavailable
from foundry.store import CartridgeStore, Collected, Manifest, RunState, StoreSettings
from foundry.store.upkeep import marks
from foundry.store.upkeep.gc import Collector
from tests.contract.sweep import gc, keys
from tests.store_data import cartridge, draft, run_spec
from tests.valkey import Valkey

BYTES = 1024


@pytest.fixture
async def collecting(valkey: Valkey, tmp_path: Path) -> AsyncIterator[CartridgeStore]:
    """A store whose collector takes what is as young as can be; run-a, attempt 1, holds `report`."""
    settings = {"redis_url": valkey.url, "objects_url": f"file://{tmp_path}/objects", "keep_hot": 2}
    opened = await CartridgeStore.open(StoreSettings.model_validate(settings | {"sweep_grace_seconds": 0}))
    await opened.acquire("report", "run-a", 1)
    yield opened
    await opened.close()


async def publish(store: CartridgeStore, step: int, *, durable: bool = True, name: str = "report") -> Manifest:
    return await store.publish(cartridge(step), draft(name, step=step), durable=durable)


async def blobs(store: CartridgeStore) -> set[str]:
    return {
        f"blake3:{key.rpartition('/')[2].removesuffix('.safetensors')}" for key in await store.objects.keys("blobs")
    }


async def test_nothing_goes_without_a_limit(collecting: CartridgeStore) -> None:
    for step in range(6):
        await publish(collecting, step)
    await collecting.release("report", "run-a", 1)
    assert await gc(collecting) == []


async def test_durable_versions_beyond_the_newest_go_with_their_blobs(collecting: CartridgeStore) -> None:
    manifests = [await publish(collecting, step) for step in range(6)]
    await collecting.tag("report", "best", 1)
    await collecting.lease(manifests[1].digest, "rollout-0", 60)
    await collecting.release("report", "run-a", 1)
    collected = await gc(collecting, keep_last=1)
    # 1 is tagged, 2 leased, 6 latest.
    assert keys(collected, "version") == ["report@5", "report@4", "report@3"]
    assert set(keys(collected, "blob")) == {manifests[index].digest for index in (2, 3, 4)}
    # Of these only version 5 was in Redis.
    assert [(each.key, each.num_bytes > BYTES) for each in collected if each.kind == "hot"] == [("report@5", True)]
    assert [each.version for each in await collecting.versions("report")] == [1, 2, 6]
    assert await blobs(collecting) == {manifests[index].digest for index in (0, 1, 5)}
    with pytest.raises(CartridgeNotFound):
        await collecting.fetch(manifests[2].digest)
    for index in (0, 1, 5):
        assert (await collecting.fetch(manifests[index].digest)).digest() == manifests[index].digest


async def test_a_run_that_holds_the_name_keeps_its_versions(collecting: CartridgeStore) -> None:
    for step in range(4):
        await publish(collecting, step)
    assert await gc(collecting, keep_last=1) == []
    await collecting.release("report", "run-a", 1)
    await collecting.acquire("report", "run-b", 1)
    # The name is held again, but not by the run that made them.
    assert keys(await gc(collecting, keep_last=1), "version") == ["report@3", "report@2", "report@1"]


async def test_old_versions_go_by_age(collecting: CartridgeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(3):
        await publish(collecting, step)
    await collecting.release("report", "run-a", 1)
    assert await gc(collecting, max_age_days=1) == []
    init = Collector.__init__

    def two_days_later(self: Collector, *args: object, **values: object) -> None:
        init(self, *args, **values)  # type: ignore[arg-type]
        self._began += timedelta(days=2)

    monkeypatch.setattr(Collector, "__init__", two_days_later)
    assert keys(await gc(collecting, max_age_days=1), "version") == ["report@2", "report@1"]


async def test_bytes_whose_trimming_a_lease_put_off_go_when_it_ends(collecting: CartridgeStore) -> None:
    manifests = [await publish(collecting, step, durable=step == 0) for step in range(2)]
    for manifest in manifests:
        await collecting.lease(manifest.digest, "rollout-0", 60)
    for step in range(2, 4):
        await publish(collecting, step, durable=False)
    assert await gc(collecting) == []
    for manifest in manifests:
        await collecting.unlease(manifest.digest, "rollout-0")
    assert sorted(keys(await gc(collecting), "hot")) == ["report@1", "report@2"]
    # Version 1 is durable and stays; version 2 was only hot.
    assert [each.version for each in await collecting.versions("report")] == [1, 3, 4]
    assert (await collecting.fetch(manifests[0].digest)).digest() == manifests[0].digest


async def test_bytes_that_names_share_count_once(collecting: CartridgeStore) -> None:
    manifest = await publish(collecting, 0, durable=False)
    await collecting.acquire("copy", "run-b", 1)
    await collecting.publish(cartridge(0), draft("copy", run="run-b"), durable=False)
    await collecting.lease(manifest.digest, "rollout-0", 60)
    for step in range(1, 3):
        await publish(collecting, step, durable=False)
        await collecting.publish(cartridge(step), draft("copy", run="run-b", step=step), durable=False)
    await collecting.unlease(manifest.digest, "rollout-0")
    collected = await gc(collecting)
    assert [(each.key, each.num_bytes > BYTES) for each in collected] == [("copy@1", False), ("report@1", True)]


async def test_a_blob_that_another_name_needs_stays(collecting: CartridgeStore) -> None:
    manifest = await publish(collecting, 0)
    await collecting.acquire("copy", "run-b", 1)
    await collecting.publish(cartridge(0), draft("copy", run="run-b"), durable=True)
    await collecting.release("copy", "run-b", 1)
    await collecting.delete("copy")
    assert await gc(collecting) == []
    assert await blobs(collecting) == {manifest.digest}


async def test_young_blobs_stay(store: CartridgeStore) -> None:
    await store.objects.put(f"blobs/blake3/{'0' * 64}.safetensors", [b"somebody is publishing this"])
    assert await gc(store) == []


async def test_blobs_that_are_leased_reserved_or_hot_are_not_marked(collecting: CartridgeStore) -> None:
    for content in (1, 2, 3, 4):
        await collecting._durable.blobs.put(cartridge(content).digest(), cartridge(content))
    await collecting.lease(cartridge(1).digest(), "publisher", 60)
    await collecting._publisher._reserve(draft(step=2), cartridge(2).digest(), durable=True)
    await publish(collecting, 3, durable=False)
    assert keys(await gc(collecting), "blob") == [cartridge(4).digest()]
    assert await blobs(collecting) == {cartridge(content).digest() for content in (1, 2, 3)}


async def test_publishing_waits_while_its_blob_is_being_deleted(
    collecting: CartridgeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = cartridge(7).digest()
    await collecting._durable.blobs.put(digest, cartridge(7))
    deleting, resume = asyncio.Event(), asyncio.Event()
    delete = collecting._durable.blobs.delete

    async def slow(digest: str) -> None:
        deleting.set()
        await resume.wait()
        await delete(digest)

    monkeypatch.setattr(collecting._durable.blobs, "delete", slow)

    async def collect() -> list[Collected]:
        return [each async for each in collecting.gc()]

    gc_task = asyncio.create_task(collect())
    await deleting.wait()
    monkeypatch.setattr(marks, "_WAIT_SECONDS", 0.0)
    with pytest.raises(StoreUnavailable, match="collector"):
        await collecting.lease(digest, "publisher", 60)
    # The mark survives a loss of Redis, with which a publisher's lease may be lost before it reserves.
    await collecting._connection.redis.flushall()
    await collecting.acquire("report", "run-a", 1)
    with pytest.raises(StoreUnavailable, match="collector"):
        await collecting.lease(digest, "publisher", 60)
    with pytest.raises(StoreUnavailable, match="collector"):
        await publish(collecting, 7)
    monkeypatch.setattr(marks, "_WAIT_SECONDS", 30.0)
    lease = asyncio.create_task(collecting.lease(digest, "publisher", 60))
    published = asyncio.create_task(publish(collecting, 7))
    resume.set()
    assert [each.key for each in await gc_task] == [digest]
    await lease
    await published
    assert await blobs(collecting) == {digest}
    assert await collecting.objects.keys("condemned") == []


async def test_a_blob_whose_manifest_came_meanwhile_stays(
    collecting: CartridgeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = cartridge(7).digest()
    await collecting._durable.blobs.put(digest, cartridge(7))
    put = collecting._marks.put
    manifests = []

    async def publish_meanwhile(batch: str, digests: list[str]) -> None:
        await put(batch, digests)
        # Published, trimmed and no longer leased between the listing and the mark; the blob counts as old all the same.
        manifests.append(await publish(collecting, 7))
        for step in range(8, 11):
            await publish(collecting, step, durable=False)

    monkeypatch.setattr(collecting._marks, "put", publish_meanwhile)
    init = Collector.__init__

    def tomorrow(self: Collector, *args: object, **values: object) -> None:
        init(self, *args, **values)  # type: ignore[arg-type]
        self._old += timedelta(days=1)

    monkeypatch.setattr(Collector, "__init__", tomorrow)
    assert [each async for each in collecting.gc()] == []
    assert (await collecting.fetch(manifests[0].digest)).digest() == digest


async def test_publishers_of_the_same_bytes_and_a_collector_at_once(collecting: CartridgeStore) -> None:
    """Blobs are left, marked and put again all the time; no version is ever shown without its bytes."""
    publishing, num_blobs = True, 0

    async def publish_and_delete(name: str, run: str) -> None:
        for step in range(300):
            # Until the collector has come between them, and for a while.
            if step >= 12 and num_blobs:
                break
            await collecting.acquire(name, run, 1)
            await collecting.publish(cartridge(step % 2), draft(name, run=run, step=step), durable=True)
            await collecting.release(name, run, 1)
            if step % 3 == 2:
                await collecting.delete(name)

    async def collect() -> None:
        nonlocal num_blobs
        while publishing:
            num_blobs += len([each async for each in collecting.gc(keep_last=1) if each.kind == "blob"])

    await collecting.release("report", "run-a", 1)
    collector = asyncio.create_task(collect())
    await asyncio.gather(*(publish_and_delete(f"name-{index}", f"run-{index}") for index in range(3)))
    publishing = False
    await collector
    assert num_blobs > 0
    assert [each for each in [each async for each in collecting.verify()] if each.state in ("missing", "corrupt")] == []


async def test_no_blob_goes_while_a_manifest_is_unreadable(collecting: CartridgeStore) -> None:
    manifest = await publish(collecting, 0)
    await publish(collecting, 1)
    await collecting._durable.blobs.put(cartridge(7).digest(), cartridge(7))
    await collecting.objects.put("cartridges/report/0000000001.json", [b'{"name": "rep'])
    with pytest.raises(DigestMismatch, match=r"report/0000000001\.json"):
        assert [each async for each in collecting.gc()] == []
    assert {manifest.digest, cartridge(7).digest()} <= await blobs(collecting)


async def test_manifests_that_redis_does_not_know_go(collecting: CartridgeStore) -> None:
    await publish(collecting, 0)
    left = (await publish(collecting, 1)).version
    # As after a crash between the two halves of a deletion.
    await collecting._pointers.forget("report", left)
    assert keys(await gc(collecting), "version") == [f"report@{left}"]
    await collecting._connection.redis.flushall()
    assert [each.version for each in await collecting.versions("report")] == [1]


async def test_tombstones_stay(collecting: CartridgeStore) -> None:
    await collecting._durable.withdraw("report", 99)
    assert await gc(collecting, keep_last=1) == []
    assert "cartridges/report/0000000099.json" in await collecting.objects.keys("cartridges")


async def test_what_was_withdrawn_is_no_version_even_if_redis_says_so(collecting: CartridgeStore) -> None:
    manifest = await publish(collecting, 0)
    await publish(collecting, 1)
    # As after a loss of Redis between a new owner's asking and its tombstone, which was the last thing that it did.
    await collecting._durable.withdraw("report", 1)
    assert keys(await gc(collecting), "version") == ["report@1"]
    assert [each.version for each in await collecting.versions("report")] == [2]
    assert manifest.digest not in await blobs(collecting)


async def test_checkpoints_of_runs_that_are_over_go(collecting: CartridgeStore) -> None:
    runs = []
    for index in range(2):
        await collecting.runs.create(run_spec(f"name-{index}"))
        claimed = await collecting.runs.claim("worker", 60)
        assert claimed is not None
        await collecting.runs.save_checkpoint(claimed.run_id, claimed.attempt, 1, [b"state"])
        runs.append(claimed)
    await collecting.runs.finish(runs[0].run_id, runs[0].attempt, RunState.SUCCEEDED)
    collected = await gc(collecting)
    stem = f"runs/{runs[0].run_id}/checkpoints/000001-0000000001"
    assert keys(collected, "checkpoint") == [f"{stem}.json", f"{stem}.safetensors"]
    assert await collecting.runs.load_checkpoint(runs[0].run_id) is None
    assert await collecting.runs.load_checkpoint(runs[1].run_id) == (1, b"state")


async def test_what_a_dead_collector_left_is_forgotten(collecting: CartridgeStore, tmp_path: Path) -> None:
    await collecting._marks.put("dead", [cartridge(1).digest()])
    await gc(collecting)
    assert await collecting._marks.digests() == ({cartridge(1).digest()}, True)
    long_ago = (datetime.now(UTC) - timedelta(hours=1)).timestamp()
    os.utime(tmp_path / "objects/condemned/dead.json", (long_ago, long_ago))
    await gc(collecting)
    assert await collecting._marks.digests() == (set(), True)


async def test_a_mark_that_cannot_be_read_may_be_of_any_garbage(collecting: CartridgeStore) -> None:
    needed, garbage = await publish(collecting, 0), cartridge(7)
    await collecting._durable.blobs.put(garbage.digest(), garbage)
    await collecting.objects.put("condemned/batch.json", [b"{"])
    await collecting._connection.redis.flushall()
    await collecting.rebuild()
    assert await collecting._pointers.lease(needed.digest, "reader", 1)
    assert not await collecting._pointers.lease(garbage.digest(), "reader", 1)
