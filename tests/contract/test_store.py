"""Versions, pointers and bytes: what publishers and readers of one store see."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from foundry.errors import CartridgeNotFound, Conflict, DigestMismatch, Fenced, InvalidArgument, StoreUnavailable
from foundry.store import CartridgeId, CartridgeStore, Manifest, StoreSettings
from foundry.store.redis.hot_bytes import CHUNK_BYTES
from tests.store_data import cartridge, draft

pytestmark = pytest.mark.storages("file", "s3")


async def publish(store: CartridgeStore, step: int, *, durable: bool = False, content: int | None = None) -> Manifest:
    return await store.publish(cartridge(step if content is None else content), draft(step=step), durable=durable)


@pytest.fixture
async def owned(store: CartridgeStore) -> CartridgeStore:
    """A store in which run-a, attempt 1, may publish `report`."""
    await store.acquire("report", "run-a", 1)
    return store


async def hot_keys(store: CartridgeStore, digest: str) -> list[bytes]:
    return sorted([key async for key in store._connection.redis.scan_iter(f"foundry:bytes:{digest}*")])


@pytest.mark.parametrize("durable", [False, True])
async def test_published_bytes_come_back_by_every_reference(owned: CartridgeStore, durable: bool) -> None:
    # Three chunks, the last one short.
    stored = cartridge(7, num_bytes=2 * CHUNK_BYTES + 64)
    manifest = await owned.publish(stored, draft(step=4, metrics={"kl": 0.5}), durable=durable)
    assert manifest.id == CartridgeId("report", 1, stored.digest())
    for reference in ("report", "report@1", "report@latest", f"report@{stored.digest()}"):
        assert await owned.resolve(reference) == manifest.id
    fetched = await owned.fetch(manifest.digest)
    assert (fetched.header, bytes(fetched.data)) == (stored.header, bytes(stored.data))
    assert await owned.manifest("report", 1) == manifest
    assert await owned.names() == ["report"]
    assert await owned.durable_versions("report") == ({1} if durable else set())
    blobs = await owned.objects.keys("blobs")
    assert blobs == ([f"blobs/blake3/{stored.digest()[7:]}.safetensors"] if durable else [])


@pytest.mark.parametrize("durable", [False, True])
async def test_the_header_comes_without_the_bytes(owned: CartridgeStore, durable: bool) -> None:
    stored = cartridge(7, num_bytes=CHUNK_BYTES)
    manifest = await owned.publish(stored, draft(), durable=durable)
    assert await owned.header(manifest.digest) == stored.header
    # From object storage where Redis has none, or nonsense.
    redis = owned._connection.redis
    for spoilt in (b"{}", b"nonsense", None):
        key = f"foundry:bytes:{manifest.digest}"
        await (redis.delete(key) if spoilt is None else redis.set(key, spoilt))
        if durable:
            assert await owned.header(manifest.digest) == stored.header
        else:
            with pytest.raises(CartridgeNotFound if spoilt is None else DigestMismatch):
                await owned.header(manifest.digest)


async def test_a_blob_without_a_header_is_corrupt(owned: CartridgeStore) -> None:
    digest = "blake3:" + "1" * 64
    for content in (b"x" * 7, b"\xff" * 100, (2).to_bytes(8, "little") + b"{}"):
        await owned.objects.put(f"blobs/blake3/{digest[7:]}.safetensors", [content])
        with pytest.raises(DigestMismatch):
            await owned.header(digest)


async def test_values_in_redis_stay_under_4_mib(owned: CartridgeStore) -> None:
    manifest = await owned.publish(cartridge(7, num_bytes=3 * CHUNK_BYTES), draft(), durable=False)
    keys = await hot_keys(owned, manifest.digest)
    assert len(keys) == 4
    assert max([await owned._connection.redis.strlen(key) for key in keys]) <= 4 * 2**20


async def test_versions_count_up_and_latest_follows(owned: CartridgeStore) -> None:
    versions = [(await publish(owned, step)).version for step in range(3)]
    assert versions == [1, 2, 3]
    assert (await owned.resolve("report")).version == 3
    assert [manifest.version for manifest in await owned.versions("report")] == versions


async def test_publishing_the_same_step_again_returns_its_version_and_leaves_latest(owned: CartridgeStore) -> None:
    first = await publish(owned, 0)
    second = await publish(owned, 1)
    assert await publish(owned, 0) == first
    assert (await owned.resolve("report")) == second.id
    assert len(await owned.versions("report")) == 2


async def test_publishing_again_as_durable_makes_the_version_durable(owned: CartridgeStore) -> None:
    first = await publish(owned, 0)
    assert await publish(owned, 0, durable=True) == first
    assert await owned.durable_versions("report") == {1}


async def test_the_same_step_with_other_bytes_is_another_version(owned: CartridgeStore) -> None:
    first = await publish(owned, 0, content=1)
    other = await publish(owned, 0, content=2)
    assert (first.version, other.version) == (1, 2)
    assert first.digest != other.digest


async def test_only_the_newest_hot_versions_are_kept(owned: CartridgeStore) -> None:
    manifests = [await publish(owned, step, durable=step == 0) for step in range(7)]
    # keep_hot is 4; version 1 is durable and outlives its hot bytes.
    assert [manifest.version for manifest in await owned.versions("report")] == [1, 4, 5, 6, 7]
    assert await hot_keys(owned, manifests[0].digest) == []
    assert (await owned.fetch(manifests[0].digest)).digest() == manifests[0].digest
    assert await hot_keys(owned, manifests[1].digest) == []
    with pytest.raises(CartridgeNotFound):
        await owned.fetch(manifests[1].digest)
    with pytest.raises(CartridgeNotFound):
        await owned.resolve("report@2")
    assert (await owned.fetch(manifests[3].digest)).digest() == manifests[3].digest


async def test_tagged_and_leased_versions_stay_hot(owned: CartridgeStore) -> None:
    manifests = [await publish(owned, step) for step in range(3)]
    await owned.tag("report", "best", 1)
    await owned.lease(manifests[1].digest, "rollout-0", 60)
    for step in range(3, 9):
        await publish(owned, step)
    assert [len(await hot_keys(owned, manifest.digest)) for manifest in manifests] == [2, 2, 0]
    await owned.untag("report", "best")
    await owned.unlease(manifests[1].digest, "rollout-0")
    await publish(owned, 9)
    assert [len(await hot_keys(owned, manifest.digest)) for manifest in manifests] == [0, 0, 0]


async def test_leases_end(owned: CartridgeStore) -> None:
    digest = (await publish(owned, 0)).digest
    await owned.lease(digest, "long", 60)
    await owned.lease(digest, "short", 0.001)
    async with asyncio.timeout(5):
        while "short" in await owned.leases(digest):
            pass
    assert await owned.leases(digest) == ["long"]
    with pytest.raises(InvalidArgument):
        await owned.lease(digest, "never", 0)


async def test_bytes_shared_by_two_names_outlive_one_of_them(owned: CartridgeStore) -> None:
    manifest = await publish(owned, 0)
    await owned.acquire("copy", "run-b", 1)
    await owned.publish(cartridge(0), draft("copy", run="run-b"), durable=False)
    await owned.release("copy", "run-b", 1)
    await owned.delete("copy")
    assert (await owned.fetch(manifest.digest)).digest() == manifest.digest
    await owned.release("report", "run-a", 1)
    await owned.delete("report")
    with pytest.raises(CartridgeNotFound):
        await owned.fetch(manifest.digest)


async def test_what_does_not_exist_is_not_found(owned: CartridgeStore) -> None:
    await publish(owned, 0)
    absent = "blake3:" + "0" * 64
    for reference in ("other", "report@2", "report@best", f"report@{absent}", "acme/report"):
        with pytest.raises(CartridgeNotFound):
            await owned.resolve(reference)
    with pytest.raises(CartridgeNotFound):
        await owned.fetch(absent)
    with pytest.raises(CartridgeNotFound):
        await owned.manifest("report", 2)
    with pytest.raises(CartridgeNotFound):
        await owned.tag("report", "best", 2)
    with pytest.raises(CartridgeNotFound):
        await owned.untag("report", "best")
    with pytest.raises(CartridgeNotFound):
        await owned.delete("report", 2)
    with pytest.raises(CartridgeNotFound):
        await owned.delete("other")
    assert await owned.versions("other") == []


async def test_concurrent_fetches_share_one_transfer(owned: CartridgeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = (await publish(owned, 0)).digest
    reads = 0
    get = owned._hot.get

    async def counted(digest: str) -> object:
        nonlocal reads
        reads += 1
        return await get(digest)

    monkeypatch.setattr(owned._hot, "get", counted)
    fetched = await asyncio.gather(*(owned.fetch(digest) for _ in range(20)))
    assert reads == 1
    assert all(each is fetched[0] for each in fetched)


async def test_a_fetch_survives_the_caller_that_began_it(owned: CartridgeStore) -> None:
    digest = (await publish(owned, 0)).digest
    first = asyncio.create_task(owned.fetch(digest))
    second = asyncio.create_task(owned.fetch(digest))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).digest() == digest


@pytest.fixture
def blob(tmp_path: Path, owned: CartridgeStore) -> Path:
    """Where the blob of cartridge 0 lies on disk."""
    return tmp_path / "objects/blobs/blake3" / f"{cartridge(0).digest()[7:]}.safetensors"


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def hang(path: Path) -> Path:
    """From now on whoever opens it waits. Returns where the file is."""
    moved = path.rename(path.with_suffix(".moved"))
    os.mkfifo(path)
    return moved


def let_go(path: Path, moved: Path) -> None:
    os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
    moved.rename(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


async def test_a_corrupt_hot_byte_falls_back_to_the_blob(owned: CartridgeStore) -> None:
    digest = (await publish(owned, 0, durable=True)).digest
    await owned._connection.redis.setrange(f"foundry:bytes:{digest}:0", 5, b"!")
    assert (await owned.fetch(digest)).digest() == digest
    assert await hot_keys(owned, digest) == [], "the corrupt copy is kept"


@pytest.mark.parametrize("damage", ["append", "truncate", "nonsense"])
async def test_a_hot_copy_of_the_wrong_shape_falls_back_to_the_blob(owned: CartridgeStore, damage: str) -> None:
    digest = (await publish(owned, 0, durable=True)).digest
    redis = owned._connection.redis
    if damage == "append":
        await redis.append(f"foundry:bytes:{digest}:0", b"!")
    elif damage == "truncate":
        await redis.set(f"foundry:bytes:{digest}:0", b"!")
    else:
        await redis.set(f"foundry:bytes:{digest}", b"{")
    assert (await owned.fetch(digest)).digest() == digest


async def test_a_hot_copy_that_lacks_a_chunk_falls_back_to_the_blob(owned: CartridgeStore) -> None:
    digest = (await publish(owned, 0, durable=True)).digest
    await owned._connection.redis.delete(f"foundry:bytes:{digest}:0")
    assert (await owned.fetch(digest)).digest() == digest


@pytest.mark.storages("file")
async def test_corrupt_in_both_places_is_a_digest_mismatch(owned: CartridgeStore, blob: Path) -> None:
    digest = (await publish(owned, 0, durable=True)).digest
    await owned._connection.redis.setrange(f"foundry:bytes:{digest}:0", 5, b"!")
    flip_last_byte(blob)
    with pytest.raises(DigestMismatch):
        await owned.fetch(digest)


@pytest.mark.storages("file")
async def test_a_blob_that_never_opens_does_not_hold_its_digest(
    owned: CartridgeStore, store_settings: StoreSettings, blob: Path
) -> None:
    digest = (await publish(owned, 0, durable=True)).digest
    await owned._pointers.drop_bytes(digest)
    moved = hang(blob)
    store = await CartridgeStore.open(store_settings.model_copy(update={"objects_timeout_seconds": 0.1}))
    try:
        with pytest.raises(StoreUnavailable, match="has not answered for"):
            await store.fetch(digest)
        let_go(blob, moved)
        assert (await store.fetch(digest)).digest() == digest
    finally:
        await store.close()


async def test_a_corrupt_hot_only_version_is_a_digest_mismatch(owned: CartridgeStore) -> None:
    digest = (await publish(owned, 0)).digest
    await owned._connection.redis.setrange(f"foundry:bytes:{digest}:0", 5, b"!")
    with pytest.raises(DigestMismatch):
        await owned.fetch(digest)


@pytest.mark.storages("file")
async def test_a_cut_blob_is_a_digest_mismatch_and_publishing_again_repairs_it(
    owned: CartridgeStore, blob: Path
) -> None:
    digest = (await publish(owned, 0, durable=True)).digest
    cut(blob)
    await owned._pointers.drop_bytes(digest)
    with pytest.raises(DigestMismatch):
        await owned.fetch(digest)
    await publish(owned, 1, durable=True, content=0)
    await owned._pointers.drop_bytes(digest)
    assert (await owned.fetch(digest)).digest() == digest


async def test_tags_move_and_make_versions_durable(owned: CartridgeStore) -> None:
    for step in range(3):
        await publish(owned, step)
    await owned.tag("report", "best", 1)
    await owned.tag("report", "best", 2)
    await owned.tag("report", "good", 2)
    assert await owned.tags("report") == {"best": 2, "good": 2}
    assert (await owned.resolve("report@best")).version == 2
    assert await owned.durable_versions("report") == {1, 2}
    await owned.untag("report", "good")
    assert await owned.tags("report") == {"best": 2}
    assert await owned.objects.keys("cartridges/report/tags") == ["cartridges/report/tags/best.json"]


async def test_a_late_write_of_a_tag_gives_way_to_the_newer_one(
    owned: CartridgeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(2):
        await publish(owned, step, durable=True)
    put_tag = owned._durable.put_tag
    writing, overtaken = asyncio.Event(), asyncio.Event()

    async def late(*args: object) -> None:
        monkeypatch.undo()
        writing.set()
        await overtaken.wait()
        await put_tag(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(owned._durable, "put_tag", late)
    older = asyncio.create_task(owned.tag("report", "best", 1))
    await writing.wait()
    await owned.tag("report", "best", 2)
    overtaken.set()
    await older
    assert await owned.tags("report") == {"best": 2}
    assert await owned._durable.tags("report") == {"best": 2}


async def test_latest_and_tagged_versions_cannot_be_deleted(owned: CartridgeStore) -> None:
    for step in range(3):
        await publish(owned, step, durable=True)
    await owned.tag("report", "best", 2)
    for version in (2, 3):
        with pytest.raises(Conflict):
            await owned.delete("report", version)
    await owned.delete("report", 1)
    assert [manifest.version for manifest in await owned.versions("report")] == [2, 3]
    assert len(await owned.objects.keys_here("cartridges/report")) == 2
    with pytest.raises(CartridgeNotFound):
        await owned.resolve("report@1")


async def test_a_deleted_name_is_gone_and_its_numbers_are_not_used_again(owned: CartridgeStore) -> None:
    for step in range(3):
        await publish(owned, step, durable=True)
    await owned.tag("report", "best", 1)
    with pytest.raises(Conflict):
        await owned.delete("report")
    await owned.release("report", "run-a", 1)
    await owned.delete("report")
    assert await owned.names() == []
    assert await owned.objects.keys("cartridges") == []
    with pytest.raises(CartridgeNotFound):
        await owned.resolve("report")
    await owned.acquire("report", "run-b", 1)
    again = await owned.publish(cartridge(9), draft(run="run-b"), durable=True)
    assert again.version == 4


async def test_a_name_and_a_tenant_may_be_spelt_alike(store: CartridgeStore) -> None:
    for name in ("a", "a/tags", "a/a", "tags"):
        # Not by the store: `a/tags` is from before such names were refused.
        await store._pointers.acquire(name, "run-a", 1)
        await store.publish(cartridge(0), draft(name), durable=True)
        await store.tag(name, "tags", 1)
    assert await store._durable.names() == ["a", "a/a", "a/tags", "tags"]
    assert await store._durable.tags("a") == {"tags": 1}
    assert [manifest.name for manifest in await store._durable.manifests("a")] == ["a"]
    await store.release("a", "run-a", 1)
    await store.delete("a")
    assert await store.names() == ["a/a", "a/tags", "tags"]
    assert await store._durable.names() == ["a/a", "a/tags", "tags"]
    assert (await store._durable.tags("a/tags")) == {"tags": 1}


async def test_another_process_sees_what_was_published(owned: CartridgeStore, store_settings: StoreSettings) -> None:
    manifest = await publish(owned, 0)
    other = await CartridgeStore.open(store_settings)
    assert await other.resolve("report") == manifest.id
    assert (await other.fetch(manifest.digest)).digest() == manifest.digest
    with pytest.raises(Fenced):
        await other.publish(cartridge(1), draft(run="run-b", step=1), durable=False)
    await other.close()


async def test_subscribers_hear_of_versions_from_now_or_from_an_event(owned: CartridgeStore) -> None:
    first = await publish(owned, 0)
    from_now = aiter(owned.subscribe())
    heard = asyncio.ensure_future(anext(from_now))
    everything = [event async for event in _take(owned, "0-0", 1)]
    assert everything[0].cartridge == first.id
    # The subscription from now must be in place before the next version.
    second = first
    step = 1
    async with asyncio.timeout(10):
        while not heard.done():
            second = await publish(owned, step)
            step += 1
    event = await heard
    assert event.cartridge.version > 1
    assert (event.run, event.cartridge.version) == ("run-a", event.step + 1)
    assert [each.cartridge.version async for each in _take(owned, everything[0].event_id, 1)] == [2]
    assert second.version >= event.cartridge.version


async def _take(store: CartridgeStore, after: str, count: int):  # type: ignore[no-untyped-def]
    async with asyncio.timeout(10):
        async for event in store.subscribe(after):
            yield event
            count -= 1
            if not count:
                return


async def test_bytes_may_be_fetched_any_number_of_times(owned: CartridgeStore) -> None:
    digest = (await publish(owned, 0)).digest
    # The client library's pool refuses the 101st connection that it makes.
    for _ in range(101):
        await owned.fetch(digest)
