"""Publishing when things go wrong: replaced owners, races, crashes between the steps, full disks."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from foundry.errors import CartridgeNotFound, Conflict, Fenced, InvalidArgument, StoreFull
from foundry.store import CartridgeStore, Manifest, StoreSettings
from foundry.store.objects.versions import LIMIT_STEP
from foundry.store.redis.hot_bytes import CHUNK_BYTES, STAGED_SECONDS
from tests.store_data import cartridge, draft
from tests.valkey import Valkey

pytestmark = pytest.mark.storages("file", "s3")


class Crash(BaseException):
    """Stands for the death of the process: nothing of ours catches it."""


async def crash(*_: object, **__: object) -> None:
    raise Crash


# Fencing


async def test_only_one_run_holds_a_name(store: CartridgeStore) -> None:
    await store.acquire("report", "run-a", 1)
    await store.acquire("report", "run-a", 1)
    with pytest.raises(Conflict, match="run-a"):
        await store.acquire("report", "run-b", 1)
    with pytest.raises(Fenced):
        await store.release("report", "run-b", 1)
    await store.release("report", "run-a", 1)
    await store.release("report", "run-a", 1)
    await store.acquire("report", "run-b", 1)
    with pytest.raises(Conflict, match="run-b"):
        await store.acquire("report", "run-a", 2)


@pytest.mark.parametrize("run", ["", "run a", "../x"])
async def test_owners_that_would_break_keys_are_refused(store: CartridgeStore, run: str) -> None:
    with pytest.raises(InvalidArgument):
        await store.acquire("report", run, 1)


async def test_nobody_publishes_without_holding_the_name(store: CartridgeStore) -> None:
    with pytest.raises(Fenced):
        await store.publish(cartridge(0), draft(), durable=True)
    await store.acquire("report", "run-a", 1)
    await store.release("report", "run-a", 1)
    with pytest.raises(Fenced):
        await store.publish(cartridge(0), draft(), durable=True)
    assert await store.objects.keys("cartridges") == []


async def test_an_older_attempt_is_refused_when_it_reserves(store: CartridgeStore) -> None:
    await store.acquire("report", "run-a", 1)
    await store.acquire("report", "run-a", 2)
    with pytest.raises(Fenced):
        await store.publish(cartridge(0), draft(attempt=1), durable=True)
    with pytest.raises(Fenced):
        await store.acquire("report", "run-a", 1)
    await store.release("report", "run-a", 2)
    with pytest.raises(Fenced):
        await store.acquire("report", "run-a", 1)
    assert await store.names() == []


@pytest.mark.parametrize("durable", [False, True])
async def test_an_older_attempt_is_refused_when_it_commits(
    store: CartridgeStore, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    await store.acquire("report", "run-a", 1)
    commit = store._pointers.commit

    async def overtaken(*args: object, **kwargs: object) -> object:
        monkeypatch.undo()
        await store.acquire("report", "run-a", 2)
        return await commit(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(store._pointers, "commit", overtaken)
    with pytest.raises(Fenced):
        await store.publish(cartridge(0), draft(attempt=1), durable=durable)
    with pytest.raises(CartridgeNotFound):
        await store.resolve("report")
    newer = await store.publish(cartridge(1), draft(attempt=2), durable=durable)
    assert await store.resolve("report") == newer.id
    # What the older one left is not found after a loss of Redis either.
    await store._connection.redis.flushall()
    await store.rebuild()
    assert [each.digest for each in await store.versions("report")] == ([newer.digest] if durable else [])


async def test_who_released_the_name_meanwhile_does_not_commit(
    store: CartridgeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.acquire("report", "run-a", 1)
    commit = store._pointers.commit

    async def released(*args: object, **kwargs: object) -> object:
        monkeypatch.undo()
        await store.release("report", "run-a", 1)
        return await commit(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(store._pointers, "commit", released)
    with pytest.raises(Fenced):
        await store.publish(cartridge(0), draft(), durable=False)
    assert await store.versions("report") == []


async def test_a_replaced_owner_cannot_write_its_manifest_late(
    store: CartridgeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.acquire("report", "run-a", 1)
    put_manifest = store._durable.put_manifest

    async def overtaken(*args: object) -> object:
        monkeypatch.undo()
        await store.acquire("report", "run-a", 2)
        return await put_manifest(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(store._durable, "put_manifest", overtaken)
    with pytest.raises(Fenced):
        await store.publish(cartridge(0), draft(attempt=1), durable=True)
    assert await store._durable.manifests("report") == []


async def test_a_claimed_run_fences_its_earlier_attempt_before_it_acquires(store: CartridgeStore) -> None:
    redis = store._connection.redis
    await store.acquire("report", "run-a", 1)
    await redis.hset("foundry:run:run-a", "attempt", "2")
    with pytest.raises(Fenced):
        await store.publish(cartridge(0), draft(attempt=1), durable=False)


# Races


async def test_fifty_publishers_race(store: CartridgeStore) -> None:
    await store.acquire("report", "run-a", 1)
    seen: list[int] = []
    racing = True

    async def watch() -> None:
        while racing:
            try:
                seen.append((await store.resolve("report")).version)
            except CartridgeNotFound:
                await asyncio.sleep(0)

    watcher = asyncio.create_task(watch())
    order = random.Random(0).sample(range(50), 50)
    manifests = await asyncio.gather(
        *(store.publish(cartridge(step), draft(step=step), durable=step % 5 == 0) for step in order)
    )
    racing = False
    await watcher
    assert sorted(manifest.version for manifest in manifests) == list(range(1, 51))
    assert seen == sorted(seen), "latest went back"
    latest = await store.resolve("report")
    assert latest.version == 50
    assert {m.version: m.digest for m in manifests}[50] == latest.digest
    # One digest for one version, for ever: what is kept agrees with what publishers were told.
    told = {manifest.version: manifest.digest for manifest in manifests}
    assert all(told[kept.version] == kept.digest for kept in await store.versions("report"))


async def test_one_step_published_by_many_at_once_is_one_version(store: CartridgeStore) -> None:
    await store.acquire("report", "run-a", 1)
    manifests = await asyncio.gather(*(store.publish(cartridge(0), draft(), durable=True) for _ in range(10)))
    assert {manifest.version for manifest in manifests} == {1}
    assert len({manifest.to_json() for manifest in manifests}) == 1
    assert len(await store.versions("report")) == 1


async def test_a_number_taken_by_another_digest_is_a_conflict(store: CartridgeStore) -> None:
    await store.acquire("report", "run-a", 1)
    first = await store.publish(cartridge(0), draft(), durable=True)
    # As after an object store was restored from a backup of another deployment.
    other = first.model_copy(update={"version": 2})
    await store.objects.put("cartridges/report/0000000002.json", [other.to_json().encode()])
    with pytest.raises(Conflict):
        await store.publish(cartridge(1), draft(step=1), durable=True)
    assert await store.resolve("report") == first.id


async def test_numbers_beyond_the_limit_wait_for_object_storage(store: CartridgeStore) -> None:
    await store.acquire("report", "run-a", 1)
    await store.publish(cartridge(0), draft(), durable=False)
    await store._connection.redis.hset("foundry:name:report", "counter", str(LIMIT_STEP - 1))
    versions = [(await store.publish(cartridge(s), draft(step=s), durable=False)).version for s in (1, 2)]
    assert versions == [LIMIT_STEP, LIMIT_STEP + 1]
    assert await store._durable.limits() == {"report": 2 * LIMIT_STEP}


# Crashes between the steps


@pytest.mark.parametrize(
    ("part", "method", "left"),
    [
        # The first step that does not happen, and what object storage holds then.
        ("_hot", "stage", []),
        ("_pointers", "reserve", []),
        ("_durable.blobs", "put", []),
        ("_durable", "put_manifest", ["blobs"]),
        ("_pointers", "commit", ["blobs", "cartridges"]),
    ],
)
async def test_a_torn_publish_is_never_visible(
    store: CartridgeStore, monkeypatch: pytest.MonkeyPatch, part: str, method: str, left: list[str]
) -> None:
    await store.acquire("report", "run-a", 1)
    before = await store.publish(cartridge(0), draft(), durable=True)
    objects = {key.partition("/")[0]: len(await store.objects.keys(key)) for key in ("blobs", "cartridges")}
    monkeypatch.setattr(attrgetter(part)(store), method, crash)
    with pytest.raises(Crash):
        await store.publish(cartridge(1), draft(step=1), durable=True)
    monkeypatch.undo()
    grown = [key for key, count in objects.items() if len(await store.objects.keys(key)) > count]
    assert grown == left
    assert await store.resolve("report") == before.id
    assert [manifest.version for manifest in await store.versions("report")] == [1]
    with pytest.raises(CartridgeNotFound):
        await store.resolve("report@2")

    # The next attempt starts over; what the dead one left is not seen even when pointers are restored from storage.
    await store.acquire("report", "run-a", 2)
    after = await store.publish(cartridge(2), draft(step=1, attempt=2), durable=True)
    # What died after it had reserved leaves a gap.
    assert after.version == (2 if part == "_hot" or method == "reserve" else 3)
    await store._connection.redis.flushall()
    assert [manifest.version for manifest in await store.versions("report")] == [1, after.version]
    assert (await store.fetch(after.digest)).digest() == after.digest


async def test_the_same_attempt_resumes_its_own_torn_publish(
    store: CartridgeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.acquire("report", "run-a", 1)
    monkeypatch.setattr(store._pointers, "commit", crash)
    with pytest.raises(Crash):
        await store.publish(cartridge(1), draft(), durable=True)
    monkeypatch.undo()
    assert (await store.publish(cartridge(1), draft(), durable=True)).version == 1


async def test_unclaimed_hot_bytes_expire_and_claimed_ones_do_not(
    store: CartridgeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.acquire("report", "run-a", 1)
    kept = await store.publish(cartridge(0), draft(), durable=False)
    monkeypatch.setattr(store._pointers, "commit", crash)
    for content, step in ((0, 1), (1, 2)):
        with pytest.raises(Crash):
            await store.publish(cartridge(content), draft(step=step), durable=False)
    redis = store._connection.redis
    assert await redis.ttl(f"foundry:bytes:{kept.digest}") == -1
    assert await redis.ttl(f"foundry:bytes:{kept.digest}:0") == -1
    assert await redis.exists(f"foundry:bytes:{cartridge(1).digest()}") == 0
    staged = [key async for key in redis.scan_iter("foundry:staged:*")]
    assert len(staged) == 2
    for key in staged:
        assert 0 < await redis.ttl(key) <= STAGED_SECONDS


async def test_hot_bytes_lost_before_the_commit_are_written_again(
    store: CartridgeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.acquire("report", "run-a", 1)
    commit = store._pointers.commit
    digest = cartridge(0).digest()

    async def evicted(manifest: Manifest, token: str, **values: Any) -> object:
        monkeypatch.undo()
        assert await store._connection.redis.delete(f"foundry:staged:{token}:0") == 1
        return await commit(manifest, token, **values)

    monkeypatch.setattr(store._pointers, "commit", evicted)
    assert (await store.publish(cartridge(0), draft(), durable=False)).version == 1
    assert (await store.fetch(digest)).digest() == digest


async def test_publishing_bytes_again_repairs_the_damaged_hot_copy(store: CartridgeStore) -> None:
    """Under another name: the reservation does not know the bytes, their digest is the same."""
    digest = cartridge(0, num_bytes=3 * CHUNK_BYTES).digest()
    for name in ("report", "copy"):
        await store.acquire(name, f"run-{name}", 1)
        await store.publish(cartridge(0, num_bytes=3 * CHUNK_BYTES), draft(name, run=f"run-{name}"), durable=False)
        assert (await store.fetch(digest)).digest() == digest
        if name == "report":
            await store._connection.redis.setrange(f"foundry:bytes:{digest}:1", 5, b"!")


async def test_publishing_again_leaves_nothing_staged(store: CartridgeStore) -> None:
    await store.acquire("report", "run-a", 1)
    for _ in range(2):
        await store.publish(cartridge(0), draft(), durable=False)
    assert [key async for key in store._connection.redis.scan_iter("foundry:staged:*")] == []


# Full disks


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writes beyond the limit fail with EFBIG, in this process only."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.storages("file")
async def test_nothing_is_published_where_a_file_cannot_grow(store: CartridgeStore, tmp_path: Path) -> None:
    await store.acquire("report", "run-a", 1)
    before = await store.publish(cartridge(0), draft(), durable=True)
    large, again = cartridge(1, num_bytes=8 * 2**20), draft(step=1)
    with largest_file(2**20), pytest.raises(StoreFull):
        await store.publish(large, again, durable=True)
    assert await store.resolve("report") == before.id
    assert not await store.objects.exists(f"blobs/blake3/{large.digest()[7:]}.safetensors")
    files = [path for path in (tmp_path / "objects/blobs").rglob("*") if path.is_file()]
    assert len(files) == 1, "the failed write left something behind"
    after = await store.publish(large, again, durable=True)
    assert await store.resolve("report") == after.id
    await store._pointers.drop_bytes(after.digest)
    assert (await store.fetch(after.digest)).digest() == after.digest


_FILL_THE_DISK = """
import asyncio, os, sys
from pathlib import Path
from foundry.errors import StoreFull
from foundry.store import CartridgeStore, StoreSettings
from tests.store_data import cartridge, draft

async def main(redis_url, directory):
    settings = {"redis_url": redis_url, "objects_url": f"file://{directory}/objects"}
    store = await CartridgeStore.open(StoreSettings.model_validate(settings))
    await store.acquire("report", "run-a", 1)
    before = await store.publish(cartridge(0), draft(), durable=True)
    ballast = Path(directory, "ballast")
    file = os.open(ballast, os.O_CREAT | os.O_WRONLY)
    try:
        while True:
            os.write(file, bytes(4096))
    except OSError:
        os.close(file)
    for durable_content in (cartridge(1, num_bytes=2 * 2**20), cartridge(2)):
        try:
            await store.publish(durable_content, draft(step=1), durable=True)
        except StoreFull as error:
            print("full:", error)
        else:
            sys.exit("published on a full disk")
        assert await store.resolve("report") == before.id
        assert [manifest.version for manifest in await store.versions("report")] == [1]
    ballast.unlink()
    after = await store.publish(cartridge(1, num_bytes=2 * 2**20), draft(step=1), durable=True)
    assert await store.resolve("report") == after.id
    await store._pointers.drop_bytes(after.digest)
    assert (await store.fetch(after.digest)).digest() == after.digest
    await store.close()
    print("done")

asyncio.run(main(*sys.argv[1:]))
"""


_UNSHARE = ("unshare", "--user", "--map-root-user", "--mount")


def _namespaces() -> bool:
    command = [*_UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not _namespaces(), reason="needs a mount namespace of its own to have a small disk")
def test_nothing_is_published_on_a_full_disk(valkey: Valkey, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = 'mount -t tmpfs -o size=6m tmpfs "$1" && exec "$2" -W error -c "$3" "$4" "$1"'
    done = subprocess.run(
        [*_UNSHARE, "sh", "-c", script, "sh", str(disk), sys.executable, _FILL_THE_DISK, valkey.url],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("full:") == 2
    assert "os error 28" in done.stdout


async def test_a_full_redis_is_store_full_and_moves_nothing(
    store: CartridgeStore, store_settings: StoreSettings
) -> None:
    await store.acquire("report", "run-a", 1)
    before = await store.publish(cartridge(0), draft(), durable=True)
    redis = store._connection.redis
    used = (await redis.info("memory"))["used_memory"]
    await redis.config_set("maxmemory", used + 2**20)
    with pytest.raises(StoreFull):
        await store.publish(cartridge(1, num_bytes=16 * 2**20), draft(step=1), durable=False)
    await redis.config_set("maxmemory", 0)
    assert await store.resolve("report") == before.id
    after = await store.publish(cartridge(1, num_bytes=16 * 2**20), draft(step=1), durable=False)
    assert await store.resolve("report") == after.id
