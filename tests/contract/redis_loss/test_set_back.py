"""Redis back from its disk, with all that it had or with less."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from foundry.store import CartridgeStore, RunState, StoreSettings
from tests.contract.redis_loss.versions import publish
from tests.store_data import run_spec
from tests.valkey import Valkey

pytestmark = pytest.mark.storages("file", "s3")


@pytest.fixture
async def persistent(tmp_path: Path) -> AsyncIterator[Valkey]:
    server = Valkey(tmp_path, persistent=True)
    await server.start()
    yield server
    server.close()


@pytest.fixture
async def kept(persistent: Valkey, tmp_path: Path) -> AsyncIterator[CartridgeStore]:
    """A store on a Redis that writes what it has to disk."""
    settings = {"redis_url": persistent.url, "objects_url": f"file://{tmp_path}/objects"}
    opened = await CartridgeStore.open(StoreSettings.model_validate(settings))
    yield opened
    await opened.close()


async def stop_cleanly(store: CartridgeStore, server: Valkey) -> None:
    """All that Redis has is on its disk afterwards."""
    await store._connection.redis.config_set("appendfsync", "always")
    await store._connection.redis.set("written-last", 1)
    server.kill()


async def test_a_redis_that_kept_its_data_keeps_hot_versions(kept: CartridgeStore, persistent: Valkey) -> None:
    await kept.acquire("report", "run-a", 1)
    manifests = [await publish(kept, step, durable=step == 0) for step in range(3)]
    await stop_cleanly(kept, persistent)
    await persistent.start()
    assert await kept.resolve("report") == manifests[2].id
    assert (await kept.fetch(manifests[2].digest)).digest() == manifests[2].digest
    # Nobody can tell whether the disk lacked the newest numbers, so none below the limit is used.
    assert (await publish(kept, 3)).version == 101


async def test_a_version_that_was_restored_is_not_withdrawn_later(
    kept: CartridgeStore, persistent: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its publisher died between manifest and pointer, but it is whole, and a restored Redis shows it."""
    await kept.acquire("report", "run-a", 1)

    async def crash(*_: object, **__: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(kept._pointers, "commit", crash)
    with pytest.raises(asyncio.CancelledError):
        await publish(kept, 0, durable=True)
    monkeypatch.undo()
    await stop_cleanly(kept, persistent)
    await persistent.start()
    assert (await kept.resolve("report")).version == 1
    await kept.acquire("report", "run-a", 2)
    assert [manifest.version for manifest in await kept._durable.manifests("report")] == [1]


async def test_a_redis_set_back_in_time_learns_what_happened_since(
    kept: CartridgeStore, persistent: Valkey, tmp_path: Path
) -> None:
    await kept.acquire("report", "run-a", 1)
    for step in range(3):
        await publish(kept, step, durable=True)
    await kept.tag("report", "old", 1)
    await kept.tag("report", "moved", 1)
    await stop_cleanly(kept, persistent)
    await asyncio.to_thread(shutil.copytree, tmp_path / "appendonlydir", tmp_path / "snapshot")
    await persistent.start()
    before = await publish(kept, 3, durable=True)
    newest = await publish(kept, 4)
    await kept.untag("report", "old")
    await kept.tag("report", "moved", 3)
    await kept.delete("report", 2)
    await stop_cleanly(kept, persistent)
    await asyncio.to_thread(shutil.rmtree, tmp_path / "appendonlydir")
    await asyncio.to_thread(shutil.copytree, tmp_path / "snapshot", tmp_path / "appendonlydir")
    await persistent.start()
    assert await kept.resolve("report") == before.id
    assert await kept.tags("report") == {"moved": 3}
    assert [manifest.version for manifest in await kept.versions("report")] == [1, 3, before.version]
    assert (await publish(kept, 5)).version > newest.version


async def test_a_redis_set_back_in_time_brings_no_deleted_run_back(
    kept: CartridgeStore, persistent: Valkey, tmp_path: Path
) -> None:
    """Set back to when the run was trained, it would have it trained once more."""
    run_id = await kept.runs.create(run_spec())
    assert await kept.runs.claim("worker-0", 0.001) is not None
    await stop_cleanly(kept, persistent)
    await asyncio.to_thread(shutil.copytree, tmp_path / "appendonlydir", tmp_path / "snapshot")
    await persistent.start()
    await kept.runs.finish(run_id, 1, RunState.SUCCEEDED)
    await kept.runs.delete(run_id)
    await stop_cleanly(kept, persistent)
    await asyncio.to_thread(shutil.rmtree, tmp_path / "appendonlydir")
    await asyncio.to_thread(shutil.copytree, tmp_path / "snapshot", tmp_path / "appendonlydir")
    await persistent.start()
    assert await kept.runs.claim("worker-1", 60) is None
    assert await kept.runs.list() == []
