"""Checking and restoring the store, by its methods and by the commands that operators have."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foundry.errors import DigestMismatch
from foundry.store import CartridgeStore, DatasetSummary, Manifest, StoreSettings, metrics
from foundry.store.objects import layout
from foundry.store.redis.hot_bytes import CHUNK_BYTES
from foundry.store.sealed import seal
from foundry.store.upkeep.verified import Verified
from foundry.untrusted import MAX_RECORD_BYTES
from tests.store_data import cartridge, claim, draft, run_spec


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
    with pytest.raises(DigestMismatch, match="version 2"):
        await filled.resolve("report")


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
        assert done.returncode == 6
        assert done.stdout == ""
        assert done.stderr.startswith("error: Redis can't be used"), done.stderr


@pytest.mark.parametrize("tenant", ["", "acme"])
async def test_documents_data_sets_checkpoints_and_runs_are_hashed(filled: CartridgeStore, tenant: str) -> None:
    document, objects = await filled.documents.of(tenant).put("a text"), filled.objects
    dataset = "blake3:" + "ef" * 32
    rows = [{"family": "prompts", "prompt": "Who?"}]
    datasets = filled.datasets.of(tenant)
    await datasets.append(dataset, "asked", 0, rows)
    summary = DatasetSummary(digest=document, families={"prompts": {"conversations": 1}})
    await datasets.finish(dataset, summary)
    run_id = await filled.runs.create(run_spec("notes"))
    await claim(filled.runs)
    await filled.runs.save_checkpoint(run_id, 1, 1, [b"state"])
    checked = [each async for each in filled.verify()]
    assert {each.state for each in checked} == {"ok"}
    assert {"document", "dataset", "run", "checkpoint"} <= {each.kind for each in checked}

    stem, shard = f"runs/{run_id}/checkpoints/000001-0000000001", layout.dataset_shard(tenant, dataset, "asked", 0)
    text, record = layout.document(tenant, document), layout.document_info(tenant, document)
    whole = layout.dataset_summary(tenant, dataset)
    for damaged, content, expected in (
        (text, b"A text", ("corrupt", "document", record)),
        (text, None, ("missing", "document", record)),
        (shard, None, ("missing", "dataset", whole)),
        (shard, seal({"family": "asked", "number": 1, "rows": rows}).encode(), ("corrupt", "dataset", shard)),
        (f"{stem}.safetensors", b"State", ("corrupt", "checkpoint", f"{stem}.json")),
        (f"{stem}.safetensors", None, ("missing", "checkpoint", f"{stem}.json")),
        (f"{stem}.json", b"[" * 100_000, ("corrupt", "checkpoint", f"{stem}.json")),
        (f"runs/{run_id}/run.json", seal({"spec": "{}"}).encode(), ("corrupt", "run", f"runs/{run_id}/run.json")),
    ):
        before = bytes(await objects.get(damaged))
        if content is None:
            await objects.delete(damaged)
        else:
            await objects.put(damaged, [content])
        assert expected in await wrong(filled), damaged
        await objects.put(damaged, [before])
    assert await wrong(filled) == []


async def test_keys_of_another_type_are_found_and_replaced(filled: CartridgeStore) -> None:
    redis, whole = filled._connection.redis, await filled.versions("report")
    keys = ["foundry:names", "foundry:durable:report", "foundry:versions:report", "foundry:runs", "foundry:events"]
    for key in keys:
        await redis.delete(key)
        await redis.set(key, "a string")
    found = await wrong(filled)
    assert {key for _, kind, key in found if kind == "pointer"} >= set(keys)
    assert await filled.names() == ["report"]
    with pytest.raises(DigestMismatch, match="rebuild --force"):
        await filled.resolve("report")
    await filled.rebuild(force=True)
    assert await filled.versions("report") == whole[:2]
    assert (await filled.resolve("report")).version == 2


async def test_what_is_passed_over_is_counted(filled: CartridgeStore) -> None:
    def counted() -> float:
        return metrics.UNREADABLE.labels("manifest")._value.get()

    before = counted()
    await filled.objects.put("cartridges/report/0000000001.json", [b"[" * 100_000])
    assert [each.version for each in await filled._durable.manifests("report")] == [2]
    assert counted() == before + 1


async def test_a_record_that_is_too_large_is_not_read(filled: CartridgeStore) -> None:
    await filled.objects.put("cartridges/report/0000000001.json", [b" " * (MAX_RECORD_BYTES + 1)])
    with pytest.raises(DigestMismatch, match="at most"):
        await filled._durable.manifest("report", 1)
