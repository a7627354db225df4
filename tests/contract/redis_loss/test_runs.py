"""Runs after a loss of Redis."""

from __future__ import annotations

import pytest

from foundry.errors import Fenced
from foundry.store import CartridgeStore, RunState, StoreSettings
from tests.contract.redis_loss.versions import flush
from tests.store_data import run_spec
from tests.valkey import Valkey

pytestmark = pytest.mark.storages("file", "s3")


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
