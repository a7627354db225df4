"""Processes that stop without dying: a trainer that was replaced changes nothing, and everybody else waits."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from foundry.errors import Fenced
from foundry.store import CartridgeId, CartridgeStore, ManifestDraft, RunState
from tests.e2e.training import STEPS, create_run, follow, numbers
from tests.process import Process
from tests.services import START_SECONDS, Stack, wait_serving

FREEZE_AT = 3
LEASE_SECONDS = 1.0
# Longer than a lease and than the store's patience with Redis.
FROZEN_SECONDS = 2.5

pytestmark = pytest.mark.timeout(240)

Events = list[dict[str, Any]]
OnStep = Callable[[CartridgeStore, str], Awaitable[None]]


class Cluster:
    """Two rollout servers, one teacher, and two trainers, of which one has the run and the other stands by."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.rollouts = [stack.rollout() for _ in range(2)]
        self.teacher = stack.spawn("teacher", "--model", str(stack.model))
        self.trainers = {name: self.spawn_trainer(name, LEASE_SECONDS) for name in ("first", "second")}
        for process in (*self.rollouts, self.teacher, *self.trainers.values()):
            wait_serving(process)

    def spawn_trainer(self, worker: str, lease_seconds: float) -> Process:
        rollouts = ",".join(rollout.address for rollout in self.rollouts)
        return self.stack.spawn(
            "trainer",
            *("--model", str(self.stack.model), "--worker", worker, "--lease-seconds", str(lease_seconds)),
            *("--rollout-addresses", rollouts, "--teacher-address", self.teacher.address),
        )

    def train(
        self,
        name: str,
        on_steps: dict[int, OnStep] | None = None,
        *,
        end: RunState = RunState.SUCCEEDED,
        **spec: Any,
    ) -> Events:
        """A run's events to its end. What `on_steps` has for a step is done when that is first reported."""

        async def run(store: CartridgeStore) -> Events:
            run_id = await create_run(store, name, **({"checkpoint_every": 1, "durable_every": 1} | spec))
            waiting, events = dict(on_steps or {}), []
            async for event in follow(store, run_id):
                events.append(event)
                if event["type"] == "step" and (act := waiting.pop(event["step"], None)) is not None:
                    await act(store, run_id)
            assert events[-1]["state"] == end, events[-1]
            assert not waiting
            return events

        return self.stack.with_store(run)

    async def holder(self, store: CartridgeStore, run_id: str) -> Process:
        """The trainer that has the run in hand."""
        return self.trainers[(await store.runs.get(run_id)).worker]


async def next_line(process: Process, text: str, act: Callable[[], object]) -> None:
    """Do `act` and return when the process has logged one more line with `text`."""

    def count() -> int:
        return sum(text in line for line in process.log.read_text().splitlines())

    before = count()
    act()
    async with asyncio.timeout(START_SECONDS):
        while count() == before:
            process.check_alive()
            await asyncio.sleep(0.01)


def steps(events: Events) -> Events:
    return [event for event in events if event["type"] == "step"]


def check_numbers(events: Events, calm: Events) -> None:
    """Every step was reported, each as the calm run reported it."""
    expected = {event["step"]: numbers(event) for event in steps(calm)}
    assert {event["step"] for event in steps(events)} == set(expected)
    for event in steps(events):
        assert numbers(event) == expected[event["step"]]
    for measured in ("heldout_kl_first", "heldout_kl_last", "digest", "tokens_seen"):
        assert events[-1]["result"][measured] == calm[-1]["result"][measured]


async def check_fenced(store: CartridgeStore, name: str, run_id: str, attempt: int, stack: Stack) -> None:
    """Nothing that this attempt could do is done."""
    stored = stack.cartridge(seed=1).to_bytes()
    for durable in (False, True):
        with pytest.raises(Fenced):
            await store.publish(
                stored, ManifestDraft(name=name, run=run_id, attempt=attempt, step=FREEZE_AT + 1), durable=durable
            )
    with pytest.raises(Fenced):
        await store.runs.report(run_id, attempt, {"type": "step", "step": FREEZE_AT + 1})
    with pytest.raises(Fenced):
        await store.runs.save_checkpoint(run_id, attempt, FREEZE_AT + 1, [b"stale"])
    with pytest.raises(Fenced):
        await store.runs.finish(run_id, attempt, RunState.FAILED)
    with pytest.raises(Fenced):
        await store.acquire(name, run_id, attempt)


def check_second_attempt(stack: Stack, name: str, events: Events) -> None:
    """After the second attempt began, everything is its own: events, versions and checkpoints."""
    attempts = [event["attempt"] for event in steps(events)]
    assert attempts == sorted(attempts)
    assert set(attempts) == {1, 2}
    last_of_first = max(event["step"] for event in steps(events) if event["attempt"] == 1)

    async def check(store: CartridgeStore) -> None:
        manifests = await store.versions(name)
        assert [manifest.step for manifest in manifests] == list(range(STEPS + 1))
        for manifest in manifests:
            # A version that was published and not yet reported when its attempt was replaced stands: same digest.
            assert manifest.attempt == (1 if manifest.step <= last_of_first else 2) or (
                manifest.step == last_of_first + 1
            )
        run_id = manifests[0].run
        kept = [key for key in await store.objects.keys(f"runs/{run_id}/checkpoints") if key.endswith(".json")]
        assert [key.rpartition("/")[2][:6] for key in kept] == ["000002", "000002"]
        assert (await store.runs.get(run_id)).attempt == 2

    stack.with_store(check)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(
        tmp_path_factory.mktemp("fencing"), recovery_lease_seconds=LEASE_SECONDS, redis_timeout_seconds=LEASE_SECONDS
    )
    asyncio.run(stack.valkey.start())
    yield stack
    stack.close()


@pytest.fixture(scope="module")
def cluster(stack: Stack) -> Cluster:
    return Cluster(stack)


@pytest.fixture(scope="module")
def calm(cluster: Cluster) -> Events:
    return cluster.train("calm")


def test_a_frozen_trainer_is_replaced_and_gives_up(stack: Stack, cluster: Cluster, calm: Events) -> None:
    frozen: list[Process] = []
    seconds_of_half_a_step = steps(calm)[-1]["seconds"]["total"] / 2

    async def freeze(store: CartridgeStore, run_id: str) -> None:
        frozen.append(await cluster.holder(store, run_id))
        # Wherever in the next step that is.
        await asyncio.sleep(seconds_of_half_a_step)
        frozen[0].freeze()

    async def thaw(store: CartridgeStore, run_id: str) -> None:
        await check_fenced(store, "frozen", run_id, 1, stack)
        await next_line(frozen[0], '"fenced"', frozen[0].thaw)

    # The thaw is two steps later, which only the other one can have computed.
    events = cluster.train("frozen", {FREEZE_AT: freeze, FREEZE_AT + 2: thaw})
    check_numbers(events, calm)
    check_second_attempt(stack, "frozen", events)
    # It works again: with the other one frozen, it is the only one that can.
    other = next(trainer for trainer in cluster.trainers.values() if trainer is not frozen[0])
    other.freeze()
    try:
        check_numbers(cluster.train("after"), calm)
    finally:
        other.thaw()


def test_a_replaced_trainer_that_does_not_know_is_refused_by_the_store(
    stack: Stack, cluster: Cluster, calm: Events
) -> None:
    """Its heartbeat is too rare to tell it: it computes its step, and the store refuses the version."""
    trainer = cluster.spawn_trainer("unaware", lease_seconds=1000)
    wait_serving(trainer)

    async def freeze_in_scoring(store: CartridgeStore, run_id: str) -> None:
        """Answers are in, signals are not: the next thing that it asks of the store is to publish."""
        await next_line(trainer, '"what": "teacher"', cluster.teacher.kill)
        trainer.freeze()
        cluster.teacher.start()
        # As if it had been silent for its whole lease.
        await store.runs.heartbeat(run_id, 1, 0.001)
        for other in cluster.trainers.values():
            other.thaw()

    async def thaw(store: CartridgeStore, run_id: str) -> None:
        await next_line(trainer, "does not hold cartridge unaware", trainer.thaw)

    for other in cluster.trainers.values():
        other.freeze()
    events = cluster.train("unaware", {FREEZE_AT: freeze_in_scoring, FREEZE_AT + 3: thaw})
    trainer.kill()
    check_numbers(events, calm)
    check_second_attempt(stack, "unaware", events)


def test_a_frozen_redis_is_waited_for(stack: Stack, cluster: Cluster, calm: Events) -> None:
    async def freeze(store: CartridgeStore, run_id: str) -> None:
        os.kill(stack.valkey.pid, signal.SIGSTOP)
        await asyncio.sleep(FROZEN_SECONDS)
        os.kill(stack.valkey.pid, signal.SIGCONT)

    # The lease may have ended meanwhile: then another attempt goes on.
    check_numbers(cluster.train("frozen-redis", {FREEZE_AT: freeze}), calm)


def test_a_frozen_rollout_server_is_waited_for(cluster: Cluster, calm: Events) -> None:
    async def freeze(store: CartridgeStore, run_id: str) -> None:
        cluster.rollouts[0].freeze()
        await asyncio.sleep(FROZEN_SECONDS)
        cluster.rollouts[0].thaw()

    events = cluster.train("frozen-rollout", {FREEZE_AT: freeze})
    check_numbers(events, calm)
    assert [(event["attempt"], event["step"]) for event in steps(events)] == [(1, step) for step in range(1, STEPS + 1)]


def test_a_version_that_nobody_has_is_published_again(stack: Stack, cluster: Cluster) -> None:
    """Redis is emptied and no rollout server keeps a hot version while the trainer asks for answers of it. It is
    published again, durably: Redis may be emptied once more before one of the servers has fetched it.
    """
    # Not the numbers of the other runs here, whose versions are all in object storage, under the same digests.
    hot: dict[str, Any] = {"seed": 5, "durable_every": 100}
    calm = cluster.train("calm-hot", **hot)
    quick, slow = cluster.rollouts
    lost: list[CartridgeId] = []
    published: list[CartridgeId] = []

    async def first_published(store: CartridgeStore) -> CartridgeId:
        async for event in store.subscribe("0-0"):
            return event.cartridge
        raise AssertionError

    async def lose_twice(store: CartridgeStore, run_id: str) -> None:
        holder = await cluster.holder(store, run_id)
        for trainer in cluster.trainers.values():
            if trainer is not holder:
                trainer.freeze()
        # Waiting for answers: whatever it has reported is published, and nothing else is in hand.
        await next_line(holder, '"what": "rollout"', quick.kill)
        holder.freeze()
        lost.append(await store.resolve("lost"))
        # Started again it holds nothing.
        slow.kill()
        slow.start()
        await asyncio.to_thread(wait_serving, slow)
        slow.freeze()
        await stack.valkey.restart()
        assert await store.resolve("lost") != lost[0]
        quick.start()
        await next_line(quick, '"cartridge loaded"', holder.thaw)
        published.append(await first_published(store))
        await stack.valkey.restart()
        slow.thaw()

    async def look(store: CartridgeStore, run_id: str) -> None:
        published.append(await first_published(store))
        for trainer in cluster.trainers.values():
            trainer.thaw()

    events = cluster.train("lost", {FREEZE_AT: lose_twice, STEPS - 1: look}, **hot)
    check_numbers(events, calm)
    assert {event["attempt"] for event in steps(events)} == {1}
    # The first new Redis was told of the version that was lost, under a number never used; the second was told of the
    # next step's, because it found that one in object storage.
    by_digest = {event["digest"]: event["step"] for event in steps(events)}
    again, next_one = (by_digest[version.digest] for version in published)
    assert again == by_digest[lost[0].digest]
    assert next_one == again + 1
    assert lost[0].version < published[0].version < published[1].version
    assert [event["version"] for event in steps(events)] == sorted({event["version"] for event in steps(events)})


def test_a_paused_run_that_is_cancelled_keeps_a_version_that_redis_lost(stack: Stack, cluster: Cluster) -> None:
    seen: Events = []

    async def lose_and_cancel(store: CartridgeStore, run_id: str) -> None:
        await store.runs.request_pause(run_id)
        async for event in follow(store, run_id):
            seen.append(event)
            if event["type"] == "state" and event["state"] == RunState.PAUSED:
                break
        await stack.valkey.restart()
        await store.runs.request_cancel(run_id)

    events = cluster.train(
        "cancelled", {FREEZE_AT: lose_and_cancel}, end=RunState.CANCELLED, seed=6, durable_every=100, num_steps=500
    )

    async def check(store: CartridgeStore) -> None:
        latest = await store.resolve("cancelled")
        assert latest.version in await store.durable_versions("cancelled")
        # Nobody held it when it was cancelled.
        assert events[-1]["result"] is None
        assert latest.digest == steps(seen)[-1]["digest"]
        assert steps(seen)[-1]["step"] >= FREEZE_AT

    stack.with_store(check)
