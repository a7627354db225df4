"""Redis emptied, gone, hung, restarted and set back: no durable version is lost, no number is used twice."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from foundry.errors import CartridgeNotFound, Fenced, StoreUnavailable
from foundry.store import CartridgeStore, Manifest, RunState, StoreSettings, TagRecord
from tests.store_data import cartridge, draft, run_spec
from tests.valkey import Valkey

pytestmark = pytest.mark.storages("file", "s3")


async def publish(store: CartridgeStore, step: int, *, durable: bool = False, attempt: int = 1) -> Manifest:
    return await store.publish(cartridge(step), draft(step=step, attempt=attempt), durable=durable)


@pytest.fixture
async def filled(store: CartridgeStore) -> CartridgeStore:
    """Versions 1 (tagged best), 2 and 4 of `report` are durable, 3 and 5 are hot."""
    await store.acquire("report", "run-a", 1)
    for step in range(5):
        await publish(store, step, durable=step in (0, 1, 3))
    await store.tag("report", "best", 1)
    return store


async def flush(store: CartridgeStore) -> None:
    await store._connection.redis.flushall()


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


# Gone


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


# Lost twice


async def test_what_was_read_for_one_redis_is_not_written_to_the_next(
    store: CartridgeStore, store_settings: StoreSettings, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process is slow to restore; meanwhile others restored, published beyond the limit, and Redis is lost again."""
    await store.acquire("report", "run-a", 1)
    await publish(store, 0, durable=True)
    slow = await CartridgeStore.open(store_settings)
    has_read, go_on = asyncio.Event(), asyncio.Event()
    read_tags = slow._durable.tag_records

    async def read_slowly(name: str) -> dict[str, TagRecord]:
        tags = await read_tags(name)
        has_read.set()
        await go_on.wait()
        return tags

    monkeypatch.setattr(slow._durable, "tag_records", read_slowly)
    await valkey.restart()
    resolving = asyncio.create_task(slow.resolve("report"))
    await has_read.wait()
    await store.acquire("report", "run-a", 1)
    newest = await publish(store, 1, durable=True)
    await valkey.restart()
    go_on.set()
    assert await resolving == newest.id
    await slow.acquire("report", "run-a", 2)
    assert (await publish(slow, 2, attempt=2)).version > newest.version
    await slow.close()


async def test_an_attempt_that_redis_forgot_is_not_given_out_again(
    store: CartridgeStore, store_settings: StoreSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = await store.runs.create(run_spec())
    begin_attempt = store.runs._archive.begin_attempt

    async def begin_after_a_loss(*args: Any) -> bool:
        await flush(store)
        await store.rebuild()
        return await begin_attempt(*args)

    monkeypatch.setattr(store.runs._archive, "begin_attempt", begin_after_a_loss)
    first = await store.runs.claim("worker-0", 60)
    other = await CartridgeStore.open(store_settings)
    second = await other.runs.claim("worker-1", 60)
    assert first is not None
    assert second is not None
    assert (first.attempt, second.attempt) == (1, 2)
    with pytest.raises(Fenced):
        await store.runs.heartbeat(run_id, first.attempt, 60)
    await other.runs.heartbeat(run_id, second.attempt, 60)
    await other.close()


# Back with what it had, or with less


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


async def test_runs_come_back(store: CartridgeStore, store_settings: StoreSettings) -> None:
    """Queued, paused, running and finished ones, each as it was."""
    runs = store.runs
    running = await runs.create(run_spec("a"))
    assert (await runs.claim("worker-0", 60)) is not None
    finished = await runs.create(run_spec("b"))
    assert (await runs.claim("worker-1", 60)) is not None
    await runs.report(finished, 1, {"type": "step", "step": 1})
    await runs.finish(finished, 1, RunState.FAILED, error="it broke", result={"step": 1})
    paused = await runs.create(run_spec("c"))
    await runs.request_pause(paused)
    queued = await runs.create(run_spec("d"))
    events = [event async for event in runs.events(finished)]
    await flush(store)
    states = {record.run_id: record.state for record in await runs.list()}
    assert states == {
        running: RunState.RUNNING,
        finished: RunState.FAILED,
        paused: RunState.PAUSED,
        queued: RunState.QUEUED,
    }
    record = await runs.get(finished)
    assert (record.error, record.result) == ("it broke", {"step": 1})
    assert [event async for event in runs.events(finished)] == events
    assert [event async for event in runs.events(finished, events[-2][0])] == events[-1:]
    # The live worker goes on, the queued run is handed out, and nothing else.
    await runs.heartbeat(running, 1, 60)
    claimed = await runs.claim("worker-2", 60)
    assert claimed is not None
    assert claimed.run_id == queued
    assert await runs.claim("worker-2", 60) is None
    await runs.request_resume(paused)
    claimed = await runs.claim("worker-2", 60)
    assert claimed is not None
    assert claimed.run_id == paused


async def test_a_running_run_whose_worker_died_with_redis_goes_to_another(
    store: CartridgeStore, store_settings: StoreSettings
) -> None:
    run_id = await store.runs.create(run_spec())
    assert (await store.runs.claim("worker-0", 60)) is not None
    await flush(store)
    other = await CartridgeStore.open(store_settings.model_copy(update={"recovery_lease_seconds": 0.05}))
    claimed = await other.runs.claim("worker-1", 60, timeout_seconds=10)
    assert claimed is not None
    assert (claimed.run_id, claimed.attempt) == (run_id, 2)
    with pytest.raises(Fenced):
        await store.runs.heartbeat(run_id, 1, 60)
    await other.close()


async def test_without_redis_runs_are_known_from_object_storage(store: CartridgeStore, valkey: Valkey) -> None:
    finished = await store.runs.create(run_spec())
    await store.runs.claim("worker-0", 60)
    await store.runs.finish(finished, 1, RunState.SUCCEEDED, result={"kl": 0.5})
    queued = await store.runs.create(run_spec())
    valkey.kill()
    record = await store.runs.get(finished)
    assert (record.state, record.result, record.attempt) == (RunState.SUCCEEDED, {"kl": 0.5}, 1)
    assert [(each.run_id, each.state) for each in await store.runs.list()] == [
        (queued, RunState.QUEUED),
        (finished, RunState.SUCCEEDED),
    ]
