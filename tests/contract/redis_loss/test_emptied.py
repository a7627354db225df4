"""Redis emptied: whoever meets it restores it, no durable version is lost, no number is used twice."""

from __future__ import annotations

import asyncio

import pytest

from foundry.errors import CartridgeNotFound, Fenced
from foundry.store import CartridgeStore, StoreSettings
from tests.contract.redis_loss.versions import flush, publish
from tests.store_data import cartridge, draft, run_spec

pytestmark = pytest.mark.storages("file", "s3")


async def test_an_emptied_redis_is_restored_by_whoever_meets_it(filled: CartridgeStore) -> None:
    durable = [await filled.manifest("report", version) for version in (1, 2, 4)]
    await flush(filled)
    # What was hot is lost; the newest durable version is the newest there is.
    assert await filled.resolve("report") == durable[2].id
    assert await filled.resolve("report@best") == durable[0].id
    assert await filled.versions("report") == durable
    assert await filled.durable_versions("report") == {1, 2, 4}
    assert await filled.tags("report") == {"best": 1}
    assert await filled.names() == ["report"]
    with pytest.raises(CartridgeNotFound):
        await filled.resolve("report@5")


async def test_numbers_are_not_used_again(filled: CartridgeStore) -> None:
    before = {manifest.version: manifest.digest for manifest in await filled.versions("report")}
    await flush(filled)
    await filled.acquire("report", "run-b", 1)
    after = await filled.publish(cartridge(99), draft(run="run-b", step=9), durable=False)
    assert after.version > max(before)
    assert (await filled.resolve("report")) == after.id


async def test_numbers_of_hot_and_of_deleted_versions_are_not_used_again(store: CartridgeStore) -> None:
    await store.acquire("report", "run-a", 1)
    for step in range(3):
        await publish(store, step)
    await store.release("report", "run-a", 1)
    await store.delete("report")
    await flush(store)
    assert await store.names() == []
    await store.acquire("report", "run-a", 2)
    assert (await publish(store, 0, attempt=2)).version > 3


async def test_a_step_that_is_durable_is_not_published_twice(filled: CartridgeStore) -> None:
    await flush(filled)
    await filled.acquire("report", "run-a", 1)
    assert (await publish(filled, 3, durable=True)).version == 4


async def test_a_store_that_opens_on_an_empty_redis_restores_it(
    filled: CartridgeStore, store_settings: StoreSettings
) -> None:
    await flush(filled)
    other = await CartridgeStore.open(store_settings)
    assert await other._connection.redis.hget("foundry:name:report", "latest") == b"4"
    assert not await filled.rebuild(), "restored twice"
    await other.close()


async def test_many_stores_may_restore_at_once(filled: CartridgeStore, store_settings: StoreSettings) -> None:
    await flush(filled)
    others = [CartridgeStore(store_settings) for _ in range(8)]
    found = await asyncio.gather(*(other.resolve("report") for other in others))
    assert {each.version for each in found} == {4}
    for other in others:
        await other.close()


async def test_concurrent_calls_of_one_process_restore_once(
    filled: CartridgeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await flush(filled)
    listed = 0
    limits = filled._durable.limits

    async def counted() -> dict[str, int]:
        nonlocal listed
        listed += 1
        return await limits()

    monkeypatch.setattr(filled._durable, "limits", counted)
    await asyncio.gather(*(filled.resolve("report") for _ in range(20)))
    assert listed == 1


async def test_one_unreadable_manifest_does_not_take_the_others_with_it(filled: CartridgeStore) -> None:
    await filled.objects.put("cartridges/report/0000000002.json", [b"{"])
    await flush(filled)
    assert await filled.durable_versions("report") == {1, 4}


async def test_redis_emptied_during_a_publish(filled: CartridgeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that holds the name is known from object storage, so its publish goes through, under another number."""
    run_id = await filled.runs.create(run_spec("notes"))
    claimed = await filled.runs.claim("worker-0", 60)
    assert claimed is not None
    await filled.acquire("notes", run_id, 1)
    commit = filled._pointers.commit

    async def emptied(*args: object, **kwargs: object) -> object:
        monkeypatch.undo()
        await flush(filled)
        return await commit(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(filled._pointers, "commit", emptied)
    manifest = await filled.publish(cartridge(7), draft("notes", run=run_id), durable=False)
    assert manifest.version > 1
    assert await filled.resolve("notes") == manifest.id
    assert (await filled.fetch(manifest.digest)).digest() == manifest.digest


async def test_redis_restored_before_the_manifest_was_written(
    store: CartridgeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number is not the publisher's any more: the manifest under it is withdrawn and another number taken."""
    run_id = await store.runs.create(run_spec())
    await store.runs.claim("worker-0", 60)
    await store.acquire("report", run_id, 1)
    put_manifest = store._durable.put_manifest

    async def restored(*args: object) -> object:
        monkeypatch.undo()
        await flush(store)
        await store.rebuild()
        return await put_manifest(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(store._durable, "put_manifest", restored)
    manifest = await store.publish(cartridge(0), draft(run=run_id), durable=True)
    await flush(store)
    assert [each.version for each in await store.versions("report")] == [manifest.version]


async def test_an_owner_without_a_run_is_forgotten_with_redis(filled: CartridgeStore) -> None:
    await flush(filled)
    with pytest.raises(Fenced, match="nobody"):
        await publish(filled, 5)


async def test_a_fenced_attempt_stays_fenced_when_redis_is_emptied(filled: CartridgeStore) -> None:
    run_id = await filled.runs.create(run_spec("notes"))
    await filled.runs.claim("worker-0", 0.001)
    again = None
    async with asyncio.timeout(10):
        while again is None:
            again = await filled.runs.claim("worker-1", 60, timeout_seconds=1)
    assert again.attempt == 2
    await filled.acquire("notes", run_id, 2)
    await flush(filled)
    with pytest.raises(Fenced):
        await filled.publish(cartridge(1), draft("notes", run=run_id, attempt=1), durable=False)
    with pytest.raises(Fenced):
        await filled.acquire("notes", run_id, 1)
    assert (await filled.publish(cartridge(1), draft("notes", run=run_id, attempt=2), durable=False)).version >= 1
