"""Deleting runs: nothing of them is left, whatever happens meanwhile, and none comes back."""

from __future__ import annotations

from typing import Any

import pytest

from foundry.errors import Conflict, Fenced, RunNotFound
from foundry.store import CartridgeStore, RunState, RunStore
from tests.store_data import cartridge, claim, draft, run_spec


async def ended(runs: RunStore, tenant: str = "acme") -> str:
    """A run that is over, with events and a checkpoint."""
    run_id = await runs.create(run_spec("acme/report"), tenant=tenant)
    claimed = await claim(runs)
    await runs.report(run_id, claimed.attempt, {"type": "step", "step": 1})
    await runs.save_checkpoint(run_id, claimed.attempt, 1, [b"state"])
    await runs.finish(run_id, claimed.attempt, RunState.SUCCEEDED)
    return run_id


async def left(store: CartridgeStore, run_id: str) -> list[str]:
    """Keys of object storage, and those of Redis that don't expire."""
    redis: Any = store._connection.redis
    keys = [f"foundry:{kind}:{run_id}" for kind in ("run", "run-events")]
    listed = [
        key for key in ("foundry:runs", "foundry:tenant-runs:acme") if await redis.zscore(key, run_id) is not None
    ]
    lasting = [key for key in keys if await redis.ttl(key) == -1]
    return [*await store.objects.keys(f"runs/{run_id}"), *listed, *lasting]


@pytest.mark.storages("file", "s3")
async def test_a_deleted_run_is_gone(store: CartridgeStore) -> None:
    runs = store.runs
    run_id, other = await ended(runs), await ended(runs)
    await runs.delete(run_id)
    for _ in range(2):
        assert await left(store, run_id) == []
        for look in (runs.get, runs.delete, runs.request_cancel):
            with pytest.raises(RunNotFound, match=f"^there is no run {run_id}$"):
                await look(run_id)
        with pytest.raises(RunNotFound):
            await runs.claim_run(run_id, "worker-0", 60)
        assert [run.run_id for run in await runs.list()] == [other]
        assert [run.run_id for run in await runs.list(tenant="acme")] == [other]
        await store._connection.redis.flushall()


@pytest.mark.parametrize("state", [RunState.QUEUED, RunState.PAUSED, RunState.RUNNING])
async def test_a_run_that_is_not_over_is_not_deleted(runs: RunStore, state: RunState) -> None:
    run_id = await runs.create(run_spec())
    if state is RunState.PAUSED:
        await runs.request_pause(run_id)
    elif state is RunState.RUNNING:
        await claim(runs)
    with pytest.raises(Conflict, match=f"run {run_id} is {state}: cancel it"):
        await runs.delete(run_id)
    assert (await runs.get(run_id)).state is state
    await runs.request_cancel(run_id)
    if state is RunState.RUNNING:
        await runs.finish(run_id, 1, RunState.CANCELLED)
    await runs.delete(run_id)
    assert await runs.list() == []


async def test_another_tenant_can_not_delete_a_run(runs: RunStore) -> None:
    run_id = await ended(runs)
    for tenant in ("", "acm"):
        with pytest.raises(RunNotFound, match=f"^there is no run {run_id}$"):
            await runs.delete(run_id, tenant=tenant)
    await runs.delete(run_id, tenant="acme")


@pytest.mark.parametrize("step", ["forget", "runs/delete", "clear"])
async def test_a_deletion_that_was_cut_off_is_no_run_after_a_loss_of_redis(
    store: CartridgeStore, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """`step` is the first that is not done any more."""
    runs, run_id = store.runs, await ended(store.runs)

    async def cut_off(*_: object) -> None:
        raise KeyError

    run = runs._run
    with monkeypatch.context() as patched:
        if step == "runs/delete":
            patched.setattr(runs, "_run", lambda script, *args: (cut_off if script == step else run)(script, *args))
        else:
            patched.setattr(runs._archive, step, cut_off)
        with pytest.raises(KeyError):
            await runs.delete(run_id)
    known = step != "clear"
    assert [each.run_id for each in await runs.list()] == [run_id] * known
    if step == "runs/delete":
        await store._connection.redis.flushall()
        assert await runs.list() == []
        assert await runs.claim("worker-0", 60) is None
    elif known:
        await runs.delete(run_id)
        assert await left(store, run_id) == []


async def test_a_worker_that_slept_is_fenced_from_a_deleted_run(store: CartridgeStore) -> None:
    runs, run_id = store.runs, await store.runs.create(run_spec())
    await claim(runs, lease_seconds=0.001)
    await claim(runs, "worker-1")
    await runs.finish(run_id, 2, RunState.FAILED)
    await runs.delete(run_id)
    for late in (
        lambda: runs.heartbeat(run_id, 1, 60),
        lambda: runs.finish(run_id, 1, RunState.SUCCEEDED),
        lambda: runs.save_checkpoint(run_id, 1, 1, [b"state"]),
        lambda: store.acquire("report", run_id, 1),
        lambda: store.publish(cartridge(0), draft(run=run_id), durable=True),
    ):
        with pytest.raises(Fenced):
            await late()
    assert await store.names() == []


async def test_a_run_that_is_damaged_can_be_deleted(store: CartridgeStore) -> None:
    run_id = await ended(store.runs)
    await store.objects.put(f"runs/{run_id}/run.json", [b"{"])
    await store._connection.redis.hset(f"foundry:run:{run_id}", "spec", "{")
    await store.runs.delete(run_id)
    assert await left(store, run_id) == []
