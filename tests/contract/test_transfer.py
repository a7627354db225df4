"""Bytes on their way: resumed after a cut, hashed as they come, within their memory."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import chain, repeat
from pathlib import Path

import pytest

from foundry.errors import CartridgeNotFound, DigestMismatch, StoreUnavailable
from foundry.identity import CartridgeBytes, CartridgeHeader
from foundry.store import CartridgeStore, StoreSettings
from foundry.store.redis.hot_bytes import CHUNK_BYTES, chunks
from tests.cut import CuttingProxy
from tests.store_data import FINGERPRINT, draft
from tests.valkey import Valkey

MIB = 2**20


def layered(num_layers: int, layer_bytes: int, content: int = 7) -> CartridgeBytes:
    header = CartridgeHeader(
        model_fingerprint=FINGERPRINT,
        num_layers=num_layers,
        num_kv_heads=1,
        head_dim=8,
        num_tokens=layer_bytes // 64,
        num_frozen=1,
        dtype="float32",
        rope={"type": "default", "theta": 10000.0},
    )
    return CartridgeBytes(header, bytes([content]) * header.num_bytes)


@asynccontextmanager
async def behind(proxy: CuttingProxy, settings: StoreSettings) -> AsyncIterator[CartridgeStore]:
    """A store whose bulk connections go through the proxy."""
    async with proxy.serving() as port:
        through = await CartridgeStore.open(
            settings.model_copy(update={"redis_url": type(settings.redis_url)(f"redis://127.0.0.1:{port}")})
        )
        direct = await CartridgeStore.open(settings)
        direct._connection.open_blocking = through._connection.open_blocking
        try:
            yield direct
        finally:
            await direct.close()
            await through.close()


def proxy_of(valkey: Valkey, cuts: Iterator[int]) -> CuttingProxy:
    # The first connection carries no bulk: the store that lends its way opens with it.
    return CuttingProxy(int(valkey.url.rpartition(":")[2]), chain([10 * MIB], cuts))


def test_chunks_follow_the_layers() -> None:
    header = layered(3, 5 * MIB // 2).header
    assert [end - begin for begin, end in chunks(header)] == [CHUNK_BYTES, MIB // 2] * 3
    assert chunks(layered(2, 1024).header) == [(0, 1024), (1024, 2048)]


@pytest.mark.parametrize("way", ["upload", "download"])
async def test_a_transfer_that_is_cut_goes_on_where_it_was(
    store_settings: StoreSettings, valkey: Valkey, way: str
) -> None:
    stored = layered(8, 2 * MIB)
    cuts = iter([5 * MIB, 7 * MIB])
    proxy = proxy_of(valkey, cuts if way == "upload" else chain([100 * MIB], cuts))
    async with behind(proxy, store_settings) as store:
        await store.acquire("report", "run-a", 1)
        manifest = await store.publish(stored, draft(), durable=False)
        before = proxy.num_bytes
        assert (await store.fetch(manifest.digest)).data == stored.data
        moved = before if way == "upload" else proxy.num_bytes - before
    assert proxy.num_cut == 2
    # Each cut costs at most the pieces that were under way.
    assert moved < 16 * MIB + 2 * 5 * CHUNK_BYTES


@pytest.mark.parametrize("way", ["upload", "download"])
async def test_a_transfer_that_moves_nothing_is_unavailable(
    store_settings: StoreSettings, valkey: Valkey, way: str
) -> None:
    stored = layered(2, 2 * MIB)
    proxy = proxy_of(valkey, repeat(MIB) if way == "upload" else chain([100 * MIB], repeat(MIB)))
    async with behind(proxy, store_settings) as store:
        await store.acquire("report", "run-a", 1)
        if way == "upload":
            with pytest.raises(StoreUnavailable):
                await store.publish(stored, draft(), durable=False)
            with pytest.raises(CartridgeNotFound):
                await store.resolve("report")
        else:
            manifest = await store.publish(stored, draft(), durable=False)
            with pytest.raises(StoreUnavailable):
                await store.fetch(manifest.digest)


async def test_a_blob_is_read_in_ranges(store: CartridgeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = layered(5, 6 * MIB)
    digest = stored.digest()
    await store._durable.put_blob(digest, stored)
    ranges: list[int] = []
    get_range = store.objects.get_range

    async def counted(key: str, begin: int, end: int) -> memoryview:
        ranges.append(end - begin)
        return await get_range(key, begin, end)

    monkeypatch.setattr(store.objects, "get_range", counted)
    found = await store.fetch(digest)
    assert found.data == stored.data
    assert found.header == stored.header
    # The prologue, then whole layers.
    assert ranges[1:] == [6 * MIB] * 5


@pytest.mark.parametrize("damage", ["cut", "longer", "flipped", "huge prologue", "many layers", "no prologue"])
async def test_a_damaged_blob_is_a_digest_mismatch(store: CartridgeStore, damage: str) -> None:
    stored = layered(2, 1024)
    digest = stored.digest()
    content = bytearray(b"".join(bytes(part) for part in stored.file_parts()))
    if damage == "cut":
        content = content[:-1]
    elif damage == "longer":
        content += b"!"
    elif damage == "flipped":
        content[-5] ^= 1
    elif damage == "huge prologue":
        content[:8] = struct.pack("<Q", 2**40)
    elif damage == "many layers":
        header = json.dumps(
            {"__metadata__": {"foundry": stored.header.canonical().decode().replace(":2,", ":4000000,")}}
        )
        content = bytearray(struct.pack("<Q", len(header)) + header.encode())
    else:
        content = content[:4]
    await store.objects.put(f"blobs/blake3/{digest.removeprefix('blake3:')}.safetensors", [content])
    with pytest.raises(DigestMismatch):
        await store.fetch(digest)


MEASURE = """
import asyncio, sys
from foundry.buffers import allocate
from foundry.identity import CartridgeBytes
from foundry.store import CartridgeStore, ManifestDraft, StoreSettings
from tests.contract.test_transfer import layered

def memory(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

def peak(before):
    return memory("VmHWM") - before

def reset():
    open("/proc/self/clear_refs", "w").write("5")
    return memory("VmRSS")

async def main(redis, objects):
    store = await CartridgeStore.open(StoreSettings(redis_url=redis, objects_url=objects))
    small = layered(1, 1024)
    large = layered(8, 8 * 2**20)
    await store.acquire("report", "run-a", 1)
    for step, stored in enumerate((small, large)):
        for durable in (False, True):
            # The first, small one loads what is loaded once.
            before = reset()
            draft = ManifestDraft(name="report", run="run-a", attempt=1, step=2 * step + durable)
            digest = (await store.publish(stored, draft, durable=durable)).digest
            published = peak(before)
            if durable:
                await store._pointers.drop_bytes(digest)
            before = reset()
            await store.fetch(digest)
            fetched = peak(before)
            if stored is large:
                print(published / len(large.data), fetched / len(large.data))
    await store.close()

asyncio.run(main(*sys.argv[1:]))
"""


def test_transfers_keep_within_their_memory(valkey: Valkey, tmp_path: Path) -> None:
    """In a process of its own; by the kernel's count of what it held at most, in cartridges."""
    command = [sys.executable, "-c", MEASURE, valkey.url, f"file://{tmp_path}/objects"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    lines = [line for line in output.splitlines() if not line.startswith("20")]
    (hot_published, hot_fetched), (durable_published, durable_fetched) = (map(float, line.split()) for line in lines)
    assert hot_published < 0.2
    assert hot_fetched < 1.2
    assert durable_published < 1.2
    # A few ranges of 8 MiB are under way: half of this small one.
    assert durable_fetched < 1.7


async def test_a_process_may_transfer_for_ever(store: CartridgeStore) -> None:
    """More often than a pool of the client library makes connections."""
    await store.acquire("report", "run-a", 1)
    manifest = await store.publish(layered(1, 1024), draft(), durable=False)
    for _ in range(120):
        await store.fetch(manifest.digest)
