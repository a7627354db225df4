"""One of two rollout servers answers with old bytes under the new digest: the run stops and says which server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from foundry.store import CartridgeStore, RunState
from tests.e2e.training import create_run
from tests.services import Stack, get, metric, wait_ready, wait_serving

NAME = "deceived"

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("lying"))
    asyncio.run(stack.valkey.start())
    yield stack
    stack.close()


def test_the_run_stops_and_names_the_server(stack: Stack) -> None:
    honest = stack.rollout()
    liar = stack.rollout(module="tests.e2e.stale_rollout")
    teacher = stack.spawn("teacher", "--model", str(stack.model))
    trainer = stack.spawn(
        "trainer",
        *("--model", str(stack.model), "--teacher-address", teacher.address),
        *("--rollout-addresses", f'["{honest.address}", "{liar.address}"]'),
    )
    gateway = stack.gateway([honest])
    for process in (honest, liar, teacher, trainer):
        wait_serving(process)
    wait_ready(gateway)

    async def run(store: CartridgeStore) -> tuple[str, list[dict[str, Any]]]:
        run_id = await create_run(store, NAME)
        return run_id, [event async for _, event in store.runs.events(run_id)]

    run_id, events = stack.with_store(run)
    steps = [event for event in events if event["type"] == "step"]
    # The first step was answered with the first version, by both: there is no other to mistake it for.
    assert [event["step"] for event in steps] == [1]
    assert set(steps[0]["policy_mismatch_by_server"]) == {honest.address, liar.address}
    assert sum(each["tokens"] for each in steps[0]["policy_mismatch_by_server"].values()) == steps[0]["tokens"]

    finished = events[-1]
    assert finished["state"] == RunState.FAILED
    asked = steps[0]["digest"]
    assert finished["error"].startswith("POLICY_MISMATCH: nothing was trained: logprobs from 1 of 2 rollout servers")
    assert f"Rollout {liar.address} claimed version {steps[0]['version']}, {asked}" in finished["error"]
    assert "first in step 2, prompt 2 of 3" in finished["error"]
    assert honest.address not in finished["error"]

    # What was trained before stands; the step that was deceived left nothing.
    manifests = stack.with_store(lambda store: store.versions(NAME))
    assert [(manifest.step, manifest.digest) for manifest in manifests][1:] == [(1, asked)]
    assert len(manifests) == 2
    assert stack.with_store(lambda store: store.resolve(NAME)).digest == asked

    # Where people look.
    assert metric(trainer.metrics, "foundry_trainer_refused_total", reason="POLICY_MISMATCH") == 1
    assert metric(trainer.metrics, "foundry_trainer_runs_total", end="failed") == 1
    assert metric(trainer.metrics, "foundry_trainer_step") == 1
    shown = get(gateway, f"/v1/runs/{run_id}").json()
    assert (shown["state"], shown["error"]) == ("failed", finished["error"])
