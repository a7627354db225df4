"""Runs: the queue, leases and attempts, wishes, events."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from foundry.errors import (
    CartridgeNotFound,
    Conflict,
    DigestMismatch,
    Fenced,
    InvalidArgument,
    RunNotFound,
    RunOver,
)
from foundry.store import CartridgeStore, ClaimedRun, Desired, RunState, RunStore
from tests.store_data import cartridge, claim, draft, run_spec


async def test_a_damaged_record_of_a_run_takes_no_other_with_it(store: CartridgeStore) -> None:
    damaged, whole = await store.runs.create(run_spec()), await store.runs.create(run_spec("other"))
    key = f"runs/{damaged}/run.json"
    content = bytes(await store.objects.get(key))
    await store.objects.put(key, [content.replace(b"report", b"repost")])
    await store._connection.redis.flushall()
    assert [run.run_id for run in await store.runs.list()] == [whole]
    with pytest.raises(DigestMismatch, match=key):
        await store.runs._archive.run(damaged)
    assert (await store.runs.claim("worker", 60)).run_id == whole  # type: ignore[union-attr]


async def test_a_run_that_nobody_can_work_on_keeps_no_other_waiting(store: CartridgeStore) -> None:
    runs, redis = store.runs, store._connection.redis
    no_spec, garbled, replaced, whole = [await runs.create(run_spec(f"name-{index}")) for index in range(4)]
    await redis.hdel(f"foundry:run:{no_spec}", "spec")
    await redis.hset(f"foundry:run:{garbled}", "spec", "[" * 100_000)
    await redis.set(f"foundry:run:{replaced}", "a string")
    assert (await claim(runs)).run_id == whole
    assert [run.run_id for run in await runs.list()] == [whole]
    for run_id in (garbled, replaced):
        with pytest.raises(DigestMismatch, match=run_id):
            await runs.get(run_id)
    for run_id in (no_spec, replaced):
        with pytest.raises(DigestMismatch):
            await runs.claim_run(run_id, "worker", 60)
    await store.rebuild(force=True)
    assert {run.run_id for run in await runs.list()} == {no_spec, garbled, replaced, whole}
    assert "DIGEST_MISMATCH" in str((await runs.get(garbled)).error)


async def test_damage_on_the_way_is_read_again(store: CartridgeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = await store.runs.create(run_spec())
    await store.acquire("report", "run-a", 1)
    published = await store.publish(cartridge(0), draft(), durable=True)
    get, flipped = store.objects.get, set[str]()

    async def flip_once(key: str, **limits: Any) -> memoryview:
        content = bytearray(await get(key, **limits))
        if key not in flipped and content:
            flipped.add(key)
            content[len(content) // 2] ^= 1
        return memoryview(content)

    monkeypatch.setattr(store.objects, "get", flip_once)
    await store._connection.redis.flushall()
    assert await store.versions("report") == [published]
    assert [run.run_id for run in await store.runs.list()] == [run_id]
    assert {key.partition("/")[0] for key in flipped} == {"runs", "cartridges"}


async def events(runs: RunStore, run_id: str, after: str = "0-0") -> list[dict[str, Any]]:
    async with asyncio.timeout(10):
        return [event async for _, event in runs.events(run_id, after)]


async def test_a_run_is_queued_claimed_reported_and_finished(runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    assert (await runs.get(run_id)).state is RunState.QUEUED
    claimed = await claim(runs)
    assert claimed == ClaimedRun(run_id=run_id, attempt=1, spec=run_spec(), desired=Desired.CONTINUE)
    assert await runs.heartbeat(run_id, 1, 60, state=RunState.WAITING, waiting_for="rollout") is Desired.CONTINUE
    record = await runs.get(run_id)
    assert (record.state, record.worker, record.waiting_for) == (RunState.WAITING, "worker-0", "rollout")
    await runs.heartbeat(run_id, 1, 60)
    await runs.report(run_id, 1, {"type": "step", "step": 1, "loss": 0.5})
    await runs.finish(run_id, 1, RunState.SUCCEEDED, result={"version": 3})
    record = await runs.get(run_id)
    assert (record.state, record.error, record.result) == (RunState.SUCCEEDED, None, {"version": 3})
    assert record.last_event == {"type": "step", "step": 1, "loss": 0.5}
    assert record.started_at is not None
    assert record.finished_at is not None
    assert record.created_at <= record.started_at <= record.finished_at
    state = {"type": "state", "waiting_for": ""}
    assert await events(runs, run_id) == [
        state | {"state": "queued", "attempt": 0},
        state | {"state": "running", "attempt": 1},
        {"type": "state", "state": "waiting", "attempt": 1, "waiting_for": "rollout"},
        state | {"state": "running", "attempt": 1},
        {"type": "step", "step": 1, "loss": 0.5},
        {"type": "finished", "state": "succeeded", "error": None, "result": {"version": 3}},
    ]


async def test_runs_are_claimed_once_each_in_order(runs: RunStore) -> None:
    created = [await runs.create(run_spec(f"name-{number}")) for number in range(10)]
    claimed = await asyncio.gather(*(claim(runs, f"worker-{number}") for number in range(10)))
    assert sorted(each.run_id for each in claimed) == sorted(created)
    assert await runs.claim("worker-10", 60) is None
    assert [record.run_id for record in await runs.list()] == created[::-1]


async def test_a_waiting_worker_wakes_when_a_run_is_created(store: CartridgeStore) -> None:
    waiting = asyncio.create_task(claim(store.runs))
    while not (await store._connection.redis.info("clients"))["blocked_clients"]:
        pass
    run_id = await store.runs.create(run_spec())
    # Without being woken it would look again after 2.5 seconds, half the connection's timeout.
    async with asyncio.timeout(2):
        assert (await waiting).run_id == run_id


async def test_no_run_in_time_is_none(runs: RunStore) -> None:
    assert await runs.claim("worker-0", 60, timeout_seconds=0.05) is None


async def test_a_run_whose_lease_ended_is_claimed_anew_and_its_old_worker_fenced(runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    first = await claim(runs, lease_seconds=0.05)
    second = await claim(runs, "worker-1")
    assert (first.attempt, second.attempt, second.run_id) == (1, 2, run_id)
    with pytest.raises(Fenced):
        await runs.heartbeat(run_id, 1, 60)
    with pytest.raises(Fenced):
        await runs.report(run_id, 1, {"type": "step"})
    with pytest.raises(Fenced):
        await runs.save_checkpoint(run_id, 1, 5, [b"old"])
    with pytest.raises(Fenced):
        await runs.requeue(run_id, 1)
    with pytest.raises(Fenced):
        await runs.finish(run_id, 1, RunState.FAILED, error="too late")
    assert await runs.heartbeat(run_id, 2, 60) is Desired.CONTINUE


async def test_heartbeats_keep_a_run(runs: RunStore) -> None:
    await runs.create(run_spec())
    claimed = await claim(runs, lease_seconds=0.05)
    await runs.heartbeat(claimed.run_id, claimed.attempt, 60)
    assert await runs.claim("worker-1", 60, timeout_seconds=0.2) is None


async def test_a_run_given_back_is_claimed_at_once(runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    await claim(runs)
    await runs.requeue(run_id, 1)
    with pytest.raises(Fenced):
        await runs.heartbeat(run_id, 1, 60)
    assert (await claim(runs, "worker-1")).attempt == 2


async def test_a_run_that_is_given_back_while_it_is_cancelled_ends(runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    await claim(runs)
    await runs.request_cancel(run_id)
    await runs.requeue(run_id, 1, result={"step": 2})
    record = await runs.get(run_id)
    assert (record.state, record.result) == (RunState.CANCELLED, {"step": 2})
    assert await runs.claim("worker-1", 60) is None


async def test_one_given_run_is_claimed_and_leaves_the_queue(runs: RunStore) -> None:
    first, second = await runs.create(run_spec()), await runs.create(run_spec("other"))
    claimed = await runs.claim_run(second, "worker-0", 60)
    assert claimed == ClaimedRun(run_id=second, attempt=1, spec=run_spec("other"), desired=Desired.CONTINUE)
    assert (await runs.get(second)).worker == "worker-0"
    assert (await claim(runs)).run_id == first
    assert await runs.claim("worker-1", 60) is None


async def test_a_given_run_is_waited_for_while_another_worker_holds_it(runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    await claim(runs, lease_seconds=0.5)
    assert await runs.claim_run(run_id, "worker-1", 60) is None
    assert await runs.claim_run(run_id, "worker-1", 60, timeout_seconds=0.05) is None
    claimed = await runs.claim_run(run_id, "worker-1", 60, timeout_seconds=10)
    assert claimed is not None
    assert claimed.attempt == 2
    with pytest.raises(Fenced):
        await runs.heartbeat(run_id, 1, 60)
    # Held, and in no queue.
    assert await runs.claim("worker-2", 60) is None


async def test_only_one_of_many_claims_a_given_run(runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    claimed = await asyncio.gather(*(runs.claim_run(run_id, f"worker-{number}", 60) for number in range(10)))
    assert [each.attempt for each in claimed if each is not None] == [1]


@pytest.mark.parametrize("begun", [False, True])
async def test_a_given_run_that_is_paused_waits_for_resume(runs: RunStore, begun: bool) -> None:
    run_id = await runs.create(run_spec())
    if begun:
        await claim(runs, lease_seconds=0.05)
    await runs.request_pause(run_id)
    assert await runs.claim_run(run_id, "worker-1", 60, timeout_seconds=0.2) is None
    assert await runs.claim_run(run_id, "worker-1", 60) is None
    assert (await runs.get(run_id)).state is RunState.PAUSED
    states = [event["state"] for _, event in await runs._read_events(run_id, "0-0", block=False) if event]
    assert states.count("paused") == 1
    await runs.request_resume(run_id)
    assert await runs.claim_run(run_id, "worker-1", 60) is not None


async def test_a_given_run_that_is_over_says_so(runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    await claim(runs)
    await runs.finish(run_id, 1, RunState.SUCCEEDED)
    with pytest.raises(RunOver, match="succeeded"):
        await runs.claim_run(run_id, "worker-1", 60, timeout_seconds=10)
    with pytest.raises(RunNotFound):
        await runs.claim_run("run-absent", "worker-1", 60)


async def test_a_given_run_that_was_to_be_cancelled_ends_when_it_is_claimed(runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    await claim(runs, lease_seconds=0.05)
    await runs.request_cancel(run_id)
    with pytest.raises(RunOver, match="cancelled"):
        await runs.claim_run(run_id, "worker-1", 60, timeout_seconds=10)
    assert (await runs.get(run_id)).state is RunState.CANCELLED


async def test_active_runs_are_held_or_wait_for_a_worker(runs: RunStore) -> None:
    held, lost, queued, paused, over = [await runs.create(run_spec(f"name-{number}")) for number in range(5)]
    assert await runs.claim_run(held, "worker-0", 60) is not None
    assert await runs.claim_run(lost, "worker-0", 0.001) is not None
    assert await runs.claim_run(over, "worker-0", 60) is not None
    await runs.finish(over, 1, RunState.SUCCEEDED)
    await runs.request_pause(paused)
    async with asyncio.timeout(10):
        while (active := await runs.active()).held != {held}:
            pass
    assert active.waiting == {lost, queued}


async def test_a_queued_run_can_say_what_it_waits_for(runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    for _ in range(2):
        await runs.explain_queued(run_id, "job a: its pod is not ready")
    assert (await runs.get(run_id)).waiting_for == "job a: its pod is not ready"
    await claim(runs)
    await runs.explain_queued(run_id, "job a: its pod is not ready")
    await runs.finish(run_id, 1, RunState.SUCCEEDED)
    told = [event.get("waiting_for") for event in await events(runs, run_id)]
    assert told == ["", "job a: its pod is not ready", "", None]


async def test_pause_and_resume_reach_the_worker(runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    await claim(runs)
    await runs.request_pause(run_id)
    assert await runs.heartbeat(run_id, 1, 60) is Desired.PAUSE
    # It is not paused before it is put aside.
    assert (await runs.get(run_id)).state is RunState.RUNNING
    await runs.request_resume(run_id)
    assert await runs.heartbeat(run_id, 1, 60) is Desired.CONTINUE


async def test_a_run_that_is_given_back_paused_waits_for_resume(runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    await claim(runs)
    await runs.request_pause(run_id)
    await runs.requeue(run_id, 1)
    # One that was under way meanwhile does not take it again.
    with pytest.raises(Fenced):
        await runs.heartbeat(run_id, 1, 60)
    record = await runs.get(run_id)
    assert (record.state, record.worker) == (RunState.PAUSED, "")
    assert (await runs.active()).waiting == (await runs.active()).held == frozenset()
    assert await runs.claim("worker-1", 60) is None
    await runs.request_resume(run_id)
    assert (await claim(runs, "worker-1")).attempt == 2
    states = [event["state"] async for _, event in runs.events(run_id, follow=False)]
    assert states == ["queued", "running", "paused", "queued", "running"]


async def test_a_queued_run_that_is_paused_is_not_claimed_until_resumed(runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    await runs.request_pause(run_id)
    assert (await runs.get(run_id)).state is RunState.PAUSED
    assert await runs.claim("worker-0", 60) is None
    await runs.request_resume(run_id)
    assert (await claim(runs)).run_id == run_id


async def test_a_paused_run_whose_worker_died_waits_for_resume(runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    await claim(runs, lease_seconds=0.05)
    await runs.request_pause(run_id)
    assert await runs.claim("worker-1", 60, timeout_seconds=0.3) is None
    assert (await runs.get(run_id)).state is RunState.PAUSED
    await runs.request_resume(run_id)
    assert (await claim(runs, "worker-1")).attempt == 2


async def test_cancel_reaches_the_worker(runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    await claim(runs)
    await runs.request_cancel(run_id)
    assert await runs.heartbeat(run_id, 1, 60) is Desired.CANCEL
    with pytest.raises(Conflict):
        await runs.request_resume(run_id)
    await runs.finish(run_id, 1, RunState.CANCELLED)
    assert (await runs.get(run_id)).state is RunState.CANCELLED
    with pytest.raises(Fenced):
        await runs.heartbeat(run_id, 1, 60)


@pytest.mark.parametrize("paused", [False, True])
async def test_a_run_that_nobody_works_on_is_cancelled_at_once(runs: RunStore, paused: bool) -> None:
    run_id = await runs.create(run_spec())
    if paused:
        await runs.request_pause(run_id)
    await runs.request_cancel(run_id)
    await runs.request_cancel(run_id)
    assert (await runs.get(run_id)).state is RunState.CANCELLED
    assert (await events(runs, run_id))[-1]["type"] == "finished"
    assert await runs.claim("worker-0", 60) is None


async def test_a_cancelled_run_whose_worker_died_is_ended_by_the_next_to_ask(runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    await claim(runs, lease_seconds=0.05)
    await runs.request_cancel(run_id)
    assert await runs.claim("worker-1", 60, timeout_seconds=0.3) is None
    assert (await runs.get(run_id)).state is RunState.CANCELLED


async def test_what_is_over_stays_over(runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    await claim(runs)
    await runs.finish(run_id, 1, RunState.SUCCEEDED)
    await runs.finish(run_id, 1, RunState.SUCCEEDED)
    with pytest.raises(Fenced):
        await runs.finish(run_id, 1, RunState.FAILED, error="no")
    for request in (runs.request_cancel, runs.request_pause, runs.request_resume):
        with pytest.raises(Conflict):
            await request(run_id)
    assert len([event for event in await events(runs, run_id) if event["type"] == "finished"]) == 1


async def test_the_end_of_a_run_releases_its_cartridge(store: CartridgeStore) -> None:
    run_id = await store.runs.create(run_spec())
    await claim(store.runs)
    await store.acquire("report", run_id, 1)
    with pytest.raises(Conflict):
        await store.acquire("report", "run-b", 1)
    await store.runs.finish(run_id, 1, RunState.FAILED, error="it broke")
    await store.acquire("report", "run-b", 1)


async def test_a_run_without_a_name_of_its_own_leaves_other_owners_alone(store: CartridgeStore) -> None:
    await store.acquire("report", "run-b", 1)
    run_id = await store.runs.create(run_spec())
    await claim(store.runs)
    await store.runs.finish(run_id, 1, RunState.FAILED)
    assert (await store.publish(cartridge(0), draft(run="run-b"), durable=False)).version == 1


async def test_unknown_runs_are_not_found(runs: RunStore) -> None:
    with pytest.raises(RunNotFound):
        await runs.get("run-absent")
    with pytest.raises(Fenced):
        await runs.heartbeat("run-absent", 1, 60)
    with pytest.raises(RunNotFound):
        await runs.delete("run-absent")
    with pytest.raises(RunNotFound):
        await runs.request_cancel("run-absent")
    with pytest.raises(RunNotFound):
        await events(runs, "run-absent")
    with pytest.raises(InvalidArgument):
        await runs.get("../run")
    assert await runs.load_checkpoint("run-absent") is None


@pytest.mark.parametrize(
    "event",
    [
        {"type": "finished"},
        {"type": "step", "loss": float("nan")},
        {"type": "step", "text": "x" * 2**16},
        {"type": "step", "loss": object()},
    ],
)
async def test_events_that_cannot_be_kept_are_refused(runs: RunStore, event: dict[str, Any]) -> None:
    run_id = await runs.create(run_spec())
    await claim(runs)
    with pytest.raises(InvalidArgument) as caught:
        await runs.report(run_id, 1, event)
    assert caught.value.field == "event"


@pytest.mark.parametrize("state", [RunState.QUEUED, RunState.PAUSED, RunState.SUCCEEDED])
async def test_workers_say_only_how_they_work(runs: RunStore, state: RunState) -> None:
    run_id = await runs.create(run_spec())
    await claim(runs)
    with pytest.raises(InvalidArgument):
        await runs.heartbeat(run_id, 1, 60, state=state)
    with pytest.raises(InvalidArgument):
        await runs.finish(run_id, 1, RunState.RUNNING)


async def test_events_are_followed_as_they_come(runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    await claim(runs)
    following = asyncio.create_task(events(runs, run_id))
    last = ""
    for step in range(3):
        last = await runs.report(run_id, 1, {"type": "step", "step": step})
    await runs.finish(run_id, 1, RunState.SUCCEEDED)
    assert [event.get("step") for event in await following if event["type"] == "step"] == [0, 1, 2]
    assert [event["type"] for event in await events(runs, run_id, after=last)] == ["finished"]


async def test_a_long_history_is_kept_whole(store: CartridgeStore) -> None:
    run_id = await store.runs.create(run_spec())
    await claim(store.runs)
    for step in range(1500):
        await store.runs.report(run_id, 1, {"type": "step", "step": step})
    await store.runs.finish(run_id, 1, RunState.SUCCEEDED)
    from_redis = await events(store.runs, run_id)
    assert [event.get("step") for event in from_redis if event["type"] == "step"] == list(range(1500))
    await store._connection.redis.delete(f"foundry:run-events:{run_id}")
    assert await events(store.runs, run_id) == from_redis


async def test_a_run_of_a_name_that_is_not_there_yet_publishes_its_first_version(store: CartridgeStore) -> None:
    run_id = await store.runs.create(run_spec("notes"))
    claimed = await claim(store.runs)
    with pytest.raises(CartridgeNotFound):
        await store.resolve("notes")
    await store.acquire(claimed.spec.name, run_id, claimed.attempt)
    manifest = await store.publish(cartridge(0), draft("notes", run=run_id, attempt=claimed.attempt), durable=True)
    assert await store.resolve("notes") == manifest.id
