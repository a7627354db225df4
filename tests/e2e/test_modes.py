"""Runs that train on answers that others wrote: what is proved of them, and that they are resumed as they were."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from foundry.store import CartridgeStore
from foundry.store.conversations import ContentDigest, parts_of
from tests.e2e.training import create_run, follow, numbers, start_trainer, step_events
from tests.process import Process
from tests.services import Stack

# The first half off-policy; the kill is at a step of each half.
STEPS, SHARE, OFF_POLICY_STEPS = 8, 0.5, 4


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("modes"))
    asyncio.run(stack.valkey.start())
    yield stack
    stack.close()


@pytest.fixture(scope="module")
def trainer(stack: Stack) -> Process:
    return start_trainer(stack)[2]


async def events_of(store: CartridgeStore, name: str, **changes: Any) -> list[dict[str, Any]]:
    settings = {"num_steps": STEPS, "off_policy_share": SHARE, "heldout_every": 1, **changes}
    return [event async for event in follow(store, await create_run(store, name, **settings))]


@pytest.fixture(scope="module", params=[0, 2])
def max_staleness(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def hybrid(stack: Stack, trainer: Process, max_staleness: int) -> list[dict[str, Any]]:
    name = f"hybrid-{max_staleness}"
    return stack.with_store(lambda store: events_of(store, name, mode="hybrid", max_staleness=max_staleness))


def test_what_the_policy_says_is_proved_and_nothing_else_claims_to_be(
    hybrid: list[dict[str, Any]], max_staleness: int
) -> None:
    steps = [event for event in hybrid if event["type"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, STEPS + 1))
    first, then = steps[:OFF_POLICY_STEPS], steps[OFF_POLICY_STEPS:]
    assert all(event["policy_mismatch_kl"] is None for event in first)
    # One digest for all: the document's.
    assert len({event["sampled_digest"] for event in first}) == 1
    assert all(event["policy_mismatch_kl"] < 1e-5 for event in then)
    digests = [event["digest"] for event in steps]
    end = len(digests) - 1 - max_staleness
    assert [event["sampled_digest"] for event in then] == digests[end - len(then) : end]
    assert [event["staleness"] for event in steps] == [None] * len(first) + [max_staleness] * len(then)


@pytest.mark.parametrize("mode", ["off", "hybrid", "on"])
def test_every_mode_comes_nearer_to_the_document(stack: Stack, trainer: Process, mode: str) -> None:
    events = stack.with_store(
        lambda store: events_of(store, f"nearer-{mode}", mode=mode, num_steps=3 * STEPS, batch_size=4)
    )
    kls = [event["kl"] for event in events if event["type"] == "heldout"]
    # By how much, and for which document, is in test_learning.
    assert min(kls) < 0.97 * kls[0]


def test_what_a_trainer_says_of_its_data_set_is_what_stands(stack: Stack, trainer: Process) -> None:
    families = ("recite", "cloze", "question")

    async def read(store: CartridgeStore) -> tuple[dict[str, Any], str, list[str]]:
        events = await events_of(store, "kept", mode="off", num_steps=2, families=families)
        (said,) = (event for event in events if event["type"] == "dataset")
        content, after, parts = ContentDigest(), None, list[str]()
        while shard := await store.datasets.following(said["dataset"], parts_of(families), after):
            after = shard[:2]
            content.add(shard[2])
            parts += [shard[0]] * len(shard[2])
        return said, content.value, parts

    said, digest, parts = stack.with_store(read)
    assert said["digest"] == digest
    assert set(families) <= set(parts)
    assert len(parts) == sum(counts["conversations"] for counts in said["families"].values())
    assert said["model_fingerprint"] == stack.cartridge(1).header.model_fingerprint


@pytest.mark.parametrize("kill_at", [2, 6])
def test_a_resumed_run_is_the_undisturbed_one(
    stack: Stack, trainer: Process, hybrid: list[dict[str, Any]], max_staleness: int, kill_at: int
) -> None:
    async def killed(store: CartridgeStore) -> list[dict[str, Any]]:
        settings = {"num_steps": STEPS, "off_policy_share": SHARE, "mode": "hybrid", "heldout_every": 1}
        settings |= {"max_staleness": max_staleness}
        events = []
        async for event in step_events(store, await create_run(store, f"killed-{kill_at}-{max_staleness}", **settings)):
            events.append(event)
            if event["step"] == kill_at and event["attempt"] == 1:
                trainer.kill()
                trainer.start()
        return events

    expected = {event["step"]: numbers(event) for event in hybrid if event["type"] == "step"}
    found = stack.with_store(killed)
    assert {event["step"] for event in found} == set(expected)
    for event in found:
        assert numbers(event) == expected[event["step"]]
