"""SIGKILL at a random step: the resumed run's losses and digests are those of an undisturbed one."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from foundry.store import CartridgeStore, DocumentPrompts, RunSpec, RunState
from tests.services import Process, Stack, wait_serving

STEPS, CHECKPOINT_EVERY = 7, 3
DOCUMENT = "The harbour is open again. The treaty was signed in the spring. The price of grain is twelve. " * 2
QUESTIONS = ("What is open?", "When was the treaty signed?", "What is the price of grain?", "Who signed?", "Why?")

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("killed"))
    asyncio.run(stack.valkey.start())
    yield stack
    stack.close()


@pytest.fixture(scope="module")
def trainer(stack: Stack) -> Process:
    rollout = stack.rollout()
    teacher = stack.spawn("teacher", "--model", str(stack.model))
    trainer = stack.spawn(
        "trainer",
        *("--model", str(stack.model), "--rollout-addresses", rollout.address, "--teacher-address", teacher.address),
        *("--lease-seconds", "1"),
    )
    for process in (rollout, teacher, trainer):
        wait_serving(process)
    return trainer


async def create(store: CartridgeStore, name: str) -> str:
    prompts = "\n".join(json.dumps({"prompt": question}) for question in QUESTIONS)
    spec = RunSpec(
        name=name,
        document=await store.documents.put(DOCUMENT),
        num_tokens=20,
        num_steps=STEPS,
        batch_size=3,
        max_new_tokens=10,
        prompts=DocumentPrompts(digest=await store.documents.put(prompts)),
        learning_rate=0.02,
        checkpoint_every=CHECKPOINT_EVERY,
        policy_mismatch_threshold=1e-5,
        seed=4,
    )
    return await store.runs.create(spec)


async def steps(store: CartridgeStore, run_id: str) -> AsyncIterator[dict[str, Any]]:
    async for _, event in store.runs.events(run_id):
        if event["type"] == "step":
            yield event
        elif event["type"] == "finished":
            assert event["state"] == RunState.SUCCEEDED, event


def numbers(event: dict[str, Any]) -> dict[str, Any]:
    """What a run computes; how long it took is the machine's."""
    return {key: value for key, value in event.items() if key not in ("seconds", "version")}


@pytest.mark.parametrize("seed", [0, 1])
def test_resumed_run_equals_the_undisturbed_one(stack: Stack, trainer: Process, seed: int) -> None:
    kill_at = random.Random(seed).randrange(1, STEPS)

    async def undisturbed(store: CartridgeStore) -> list[dict[str, Any]]:
        return [event async for event in steps(store, await create(store, f"calm-{seed}"))]

    async def killed(store: CartridgeStore) -> list[dict[str, Any]]:
        events = []
        async for event in steps(store, await create(store, f"killed-{seed}")):
            events.append(event)
            if event["step"] == kill_at and len(events) == kill_at:
                trainer.kill()
                trainer.start()
        return events

    expected, found = stack.with_store(undisturbed), stack.with_store(killed)
    assert [event["step"] for event in expected] == list(range(1, STEPS + 1))
    by_step = {event["step"]: numbers(event) for event in expected}
    # Steps after the last checkpoint are computed a second time, to the same bits; no step is left out.
    for event in found:
        assert numbers(event) == by_step[event["step"]]
    assert {event["step"] for event in found} == set(by_step)
    assert [event["step"] for event in found[-(STEPS - kill_at) :]] == list(range(kill_at + 1, STEPS + 1))
    # One digest a version, one version a digest, never backwards but for what is computed again.
    versions = {event["version"]: event["digest"] for event in found}
    assert len(set(versions.values())) == len(versions) == STEPS
    assert versions[max(versions)] == expected[-1]["digest"]

    async def check_store(store: CartridgeStore) -> None:
        latest = await store.resolve(f"killed-{seed}")
        assert latest.digest == expected[-1]["digest"]
        kept = await store.versions(f"killed-{seed}")
        assert [manifest.version for manifest in kept] == sorted({manifest.version for manifest in kept})
        record = await store.runs.get((await store.runs.list())[0].run_id)
        assert record.attempt == 2

    stack.with_store(check_store)
