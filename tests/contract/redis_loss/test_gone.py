"""Redis gone or hung: durable bytes are served, nothing changes, and all works again when it is back."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
import structlog

from foundry.errors import StoreUnavailable
from foundry.store import CartridgeStore, StoreSettings
from tests.contract.redis_loss.versions import publish
from tests.store_data import cartridge, draft, run_spec
from tests.valkey import Valkey

pytestmark = pytest.mark.storages("file", "s3")


async def test_without_redis_durable_bytes_are_served(filled: CartridgeStore, valkey: Valkey) -> None:
    manifest = await filled.manifest("report", 4)
    hot = await filled.manifest("report", 5)
    valkey.kill()
    assert (await filled.fetch(manifest.digest)).digest() == manifest.digest
    assert await filled.manifest("report", 4) == manifest
    assert [each.version for each in await filled.versions("report")] == [1, 2, 4]
    assert await filled.durable_versions("report") == {1, 2, 4}
    assert await filled.names() == ["report"]
    assert await filled.tags("report") == {"best": 1}
    # Not "not found": it may be in the Redis that can't be asked.
    with pytest.raises(StoreUnavailable):
        await filled.fetch(hot.digest)
    with pytest.raises(StoreUnavailable):
        await filled.manifest("report", 5)


async def test_without_redis_references_mean_what_they_last_meant(filled: CartridgeStore, valkey: Valkey) -> None:
    latest = await filled.resolve("report")
    assert latest.version == 5
    valkey.kill()
    with structlog.testing.capture_logs() as logs:
        assert await filled.resolve("report") == latest
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [("resolved_from_memory", "warning")]
    assert logs[0]["age_seconds"] >= 0


async def test_without_redis_and_memory_object_storage_answers(
    filled: CartridgeStore, store_settings: StoreSettings, valkey: Valkey
) -> None:
    digest = (await filled.manifest("report", 2)).digest
    valkey.kill()
    fresh = await CartridgeStore.open(store_settings)
    assert (await fresh.resolve("report")).version == 4
    assert (await fresh.resolve("report@best")).version == 1
    assert (await fresh.resolve("report@2")).digest == digest
    assert (await fresh.resolve(f"report@{digest}")).version == 2
    for unknown in ("report@5", "report@good", "other", "report@blake3:" + "0" * 64):
        with pytest.raises(StoreUnavailable):
            await fresh.resolve(unknown)
    await fresh.close()


async def test_without_redis_nothing_changes(filled: CartridgeStore, valkey: Valkey) -> None:
    keys = await filled.objects.keys("")
    valkey.kill()
    with pytest.raises(StoreUnavailable):
        await publish(filled, 6, durable=True)
    with pytest.raises(StoreUnavailable):
        await filled.acquire("report", "run-a", 2)
    with pytest.raises(StoreUnavailable):
        await filled.tag("report", "good", 2)
    with pytest.raises(StoreUnavailable):
        await filled.delete("report", 2)
    with pytest.raises(StoreUnavailable):
        await filled.runs.create(run_spec())
    with pytest.raises(StoreUnavailable):
        await filled.lease(cartridge(0).digest(), "rollout-0", 10)
    with pytest.raises(StoreUnavailable):
        await anext(aiter(filled.subscribe("0-0")))
    with pytest.raises(StoreUnavailable):
        await filled.ping()
    assert await filled.objects.keys("") == keys


async def test_after_a_restart_everything_works_again(filled: CartridgeStore, valkey: Valkey) -> None:
    valkey.kill()
    with pytest.raises(StoreUnavailable):
        await publish(filled, 6)
    await valkey.restart()
    await filled.acquire("report", "run-b", 1)
    after = await filled.publish(cartridge(6), draft(run="run-b", step=6), durable=True)
    assert after.version > 5
    assert await filled.resolve("report") == after.id


async def test_a_hung_redis_is_unavailable_in_time(store_settings: StoreSettings, valkey: Valkey) -> None:
    impatient = await CartridgeStore.open(store_settings.model_copy(update={"redis_timeout_seconds": 0.2}))
    await impatient.acquire("report", "run-a", 1)
    manifest = await publish(impatient, 0, durable=True)
    os.kill(valkey.pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(3):
            with pytest.raises(StoreUnavailable):
                await publish(impatient, 1)
            assert (await impatient.fetch(manifest.digest)).digest() == manifest.digest
    finally:
        os.kill(valkey.pid, signal.SIGCONT)
    assert (await publish(impatient, 1)).version == 2
    await impatient.close()


async def test_a_script_lost_between_loading_and_running(
    store: CartridgeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis = store._connection.redis
    load = redis.script_load

    async def load_and_restart(script: str) -> str:
        digest = await load(script)
        await redis.script_flush()
        return str(digest)

    await redis.script_flush()
    monkeypatch.setattr(redis, "script_load", load_and_restart)
    with pytest.raises(StoreUnavailable):
        await store.ping()
    monkeypatch.undo()
    await store.ping()
