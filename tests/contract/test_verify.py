"""Checking and restoring the store, by its methods and by the commands that operators have."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foundry.store import CartridgeStore, Manifest, StoreSettings
from foundry.store.redis.hot_bytes import CHUNK_BYTES
from foundry.store.upkeep.verify import Verified
from tests.store_data import cartridge, draft


@pytest.fixture
async def filled(store: CartridgeStore) -> CartridgeStore:
    """Versions 1 (tagged best) and 2 of `report` are durable, 3 is hot."""
    await store.acquire("report", "run-a", 1)
    for step in range(3):
        await publish(store, step, durable=step < 2)
    await store.tag("report", "best", 1)
    return store


async def publish(store: CartridgeStore, step: int, *, durable: bool) -> Manifest:
    stored = cartridge(step, num_bytes=CHUNK_BYTES + 64)
    return await store.publish(stored, draft(step=step), durable=durable)


async def wrong(store: CartridgeStore) -> list[tuple[str, str, str]]:
    found: list[Verified] = [each async for each in store.verify() if each.state != "ok"]
    assert all(each.why for each in found)
    return [(each.state, each.kind, each.key) for each in found]


def blob_key(manifest: Manifest) -> str:
    return f"blobs/blake3/{manifest.digest[7:]}.safetensors"


async def test_a_good_store_is_read_to_the_last_byte(filled: CartridgeStore) -> None:
    checked = [each async for each in filled.verify()]
    assert {each.state for each in checked} == {"ok"}
    hashed = {kind: sum(each.num_bytes for each in checked if each.kind == kind) for kind in ("blob", "hot")}
    assert hashed == {"blob": 2 * (CHUNK_BYTES + 64), "hot": 3 * (CHUNK_BYTES + 64)}


async def test_blobs_that_are_missing_corrupt_or_cut_are_found(filled: CartridgeStore) -> None:
    first, second = await filled.manifest("report", 1), await filled.manifest("report", 2)
    await filled.objects.delete(blob_key(first))
    content = bytearray(await filled.objects.get(blob_key(second)))
    content[-1] ^= 1
    await filled.objects.put(blob_key(second), [bytes(content)])
    found = await wrong(filled)
    assert sorted(found) == [("corrupt", "blob", second.digest), ("missing", "blob", first.digest)]
    await filled.objects.put(blob_key(second), [bytes(content[:-1])])
    assert sorted(await wrong(filled)) == sorted(found)


async def test_hot_bytes_that_are_missing_or_corrupt_are_found(filled: CartridgeStore) -> None:
    first, third = await filled.manifest("report", 1), await filled.manifest("report", 3)
    await filled._connection.redis.delete(f"foundry:bytes:{first.digest}:1")
    await filled._connection.redis.setrange(f"foundry:bytes:{third.digest}:0", 5, b"\xff")
    assert sorted(await wrong(filled)) == [("corrupt", "hot", third.digest), ("missing", "hot", first.digest)]


async def test_manifests_tags_and_pointers_that_are_wrong_are_found(filled: CartridgeStore) -> None:
    await filled.objects.put("cartridges/report/0000000002.json", [b'{"name": "rep'])
    await filled.objects.delete("cartridges/report/0000000001.json")
    assert sorted(await wrong(filled)) == [
        ("corrupt", "manifest", "cartridges/report/0000000002.json"),
        ("missing", "pointer", "report@1"),
        ("missing", "pointer", "report@2"),
        ("missing", "tag", "report@best"),
    ]


async def test_orphans_are_found_when_they_are_old(filled: CartridgeStore, tmp_path: Path) -> None:
    await filled._durable.blobs.put(cartridge(9).digest(), cartridge(9))
    assert await wrong(filled) == []
    os.utime(tmp_path / f"objects/blobs/blake3/{cartridge(9).digest()[7:]}.safetensors", (0, 0))
    assert await wrong(filled) == [("orphaned", "blob", cartridge(9).digest())]


async def test_a_version_whose_blob_is_gone_is_not_restored(filled: CartridgeStore) -> None:
    second = await filled.manifest("report", 2)
    await filled.objects.delete(blob_key(second))
    await filled._connection.redis.flushall()
    assert [each.version for each in await filled.versions("report")] == [1]
    assert (await filled.resolve("report")).version == 1


# The commands run as an operator runs them: in a process of their own, with the store in the environment.


def foundry(settings: StoreSettings, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "FOUNDRY_STORE__REDIS_URL": settings.redis_url.get_secret_value(),
        "FOUNDRY_STORE__OBJECTS_URL": settings.objects_url,
        "FOUNDRY_STORE__SWEEP_GRACE_SECONDS": "0",
    }
    command = [sys.executable, "-m", "foundry.cli.main", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


async def test_verify_command(filled: CartridgeStore, store_settings: StoreSettings) -> None:
    done = await asyncio.to_thread(foundry, store_settings, "store", "verify")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "nothing wrong" in done.stderr
    first = await filled.manifest("report", 1)
    await filled.objects.delete(blob_key(first))
    done = await asyncio.to_thread(foundry, store_settings, "store", "verify")
    assert done.returncode == 1
    assert done.stdout.split()[:3] == ["missing", "blob", first.digest]
    done = await asyncio.to_thread(foundry, store_settings, "store", "verify", "--json")
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert [each["key"] for each in answer["wrong"]] == [first.digest]
    assert answer["checked"]["manifest"] == 2


async def test_rebuild_command(filled: CartridgeStore, store_settings: StoreSettings) -> None:
    done = await asyncio.to_thread(foundry, store_settings, "store", "rebuild")
    assert done.returncode == 0
    assert "nothing was restored" in done.stdout
    # As if somebody had deleted keys by hand: Redis looks whole, but is not.
    await filled._connection.redis.delete("foundry:versions:report", "foundry:durable:report")
    done = await asyncio.to_thread(foundry, store_settings, "store", "rebuild", "--force", "--json")
    assert json.loads(done.stdout)["restored"] == {"num_names": 1, "num_versions": 2, "num_runs": 0}
    assert [each.version for each in await filled.versions("report")] == [1, 2]


async def test_gc_command(filled: CartridgeStore, store_settings: StoreSettings) -> None:
    await filled.release("report", "run-a", 1)
    await filled.untag("report", "best")
    first = await filled.manifest("report", 1)
    announced = await asyncio.to_thread(foundry, store_settings, "gc", "--dry-run", "--keep-last", "1")
    assert announced.returncode == 0, announced.stderr
    assert [line.split()[0] for line in announced.stdout.splitlines()] == ["version", "hot", "blob"]
    assert announced.stderr.startswith("Would sweep: 1 version (")
    assert await filled.manifest("report", 1) == first
    done = await asyncio.to_thread(foundry, store_settings, "gc", "--keep-last", "1", "--json")
    swept = json.loads(done.stdout)
    assert [each["kind"] for each in swept["swept"]] == ["version", "hot", "blob"]
    assert swept["total"]["things"] == 3
    assert [each.version for each in await filled.versions("report")] == [2, 3]


async def test_commands_without_redis_say_so(filled: CartridgeStore, store_settings: StoreSettings) -> None:
    gone = store_settings.model_copy(update={"redis_url": type(store_settings.redis_url)("redis://127.0.0.1:1")})
    for arguments in (["gc"], ["store", "verify"], ["store", "rebuild", "--force"]):
        done = await asyncio.to_thread(foundry, gone, *arguments)
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith("error: Redis can't be used"), done.stderr
