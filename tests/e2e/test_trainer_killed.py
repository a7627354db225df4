"""SIGKILL at a random step: the resumed run's losses and digests are those of an undisturbed one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest

from foundry.store import CartridgeStore
from tests.e2e.training import STEPS, create_run, numbers, start_trainer, step_events
from tests.process import Process
from tests.services import Stack

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("killed"))
    asyncio.run(stack.valkey.start())
    yield stack
    stack.close()


@pytest.fixture(scope="module")
def trainer(stack: Stack) -> Process:
    return start_trainer(stack)[2]


# Between two checkpoints and on one, where steps in flight claim versions from before it.
@pytest.mark.parametrize(("seed", "max_staleness"), [(0, 0), (1, 0), (0, 1), (2, 2)])
def test_resumed_run_equals_the_undisturbed_one(stack: Stack, trainer: Process, seed: int, max_staleness: int) -> None:
    kill_at = random.Random(seed).randrange(1, STEPS)

    async def undisturbed(store: CartridgeStore) -> list[dict[str, Any]]:
        run_id = await create_run(store, f"calm-{seed}-{max_staleness}", max_staleness=max_staleness)
        return [event async for event in step_events(store, run_id)]

    async def killed(store: CartridgeStore) -> list[dict[str, Any]]:
        events = []
        run_id = await create_run(store, f"killed-{seed}-{max_staleness}", max_staleness=max_staleness)
        async for event in step_events(store, run_id):
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
        latest = await store.resolve(f"killed-{seed}-{max_staleness}")
        assert latest.digest == expected[-1]["digest"]
        kept = await store.versions(f"killed-{seed}-{max_staleness}")
        assert [manifest.version for manifest in kept] == sorted({manifest.version for manifest in kept})
        record = await store.runs.get((await store.runs.list())[0].run_id)
        assert record.attempt == 2

    stack.with_store(check_store)
