"""The trainer of one given run, as a Job starts it: what it sees through, gives back, and exits with."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from foundry.store import CartridgeStore, RunRecord, RunState
from tests.e2e.training import CHECKPOINT_EVERY, create_run, numbers, spawn_trainer, start_servers, step_events
from tests.process import Process
from tests.services import Stack

# Enough steps for the stop to come before the last.
STEPS, STOP_AT = 30, 4


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("of-one-run"))
    asyncio.run(stack.valkey.start())
    yield stack
    stack.close()


@pytest.fixture(scope="module")
def servers(stack: Stack) -> tuple[Process, Process]:
    return start_servers(stack)


def create(stack: Stack, name: str, **changes: Any) -> str:
    return stack.with_store(lambda store: create_run(store, name, **changes))


def record(stack: Stack, run_id: str) -> RunRecord:
    return stack.with_store(lambda store: store.runs.get(run_id))


def start(stack: Stack, servers: tuple[Process, Process], run_id: str, *arguments: str) -> Process:
    return spawn_trainer(stack, *servers, "--run", run_id, *arguments)


def steps(stack: Stack, run_id: str, *, follow: bool = True) -> list[dict[str, Any]]:
    async def read(store: CartridgeStore) -> list[dict[str, Any]]:
        told = store.runs.events(run_id, follow=follow)
        return [event async for _, event in told if event["type"] == "step"]

    return stack.with_store(read)


def wait_for_step(stack: Stack, run_id: str, step: int) -> None:
    async def wait(store: CartridgeStore) -> None:
        async for event in step_events(store, run_id):
            if event["step"] == step:
                return

    stack.with_store(wait)


@pytest.fixture(scope="module")
def calm(stack: Stack, servers: tuple[Process, Process]) -> list[dict[str, Any]]:
    """Steps of a run that nothing happens to."""
    run_id = create(stack, "calm", num_steps=STEPS)
    assert start(stack, servers, run_id).wait() == 0
    return steps(stack, run_id)


def test_a_run_that_was_stopped_goes_on_in_the_next_process(
    stack: Stack, servers: tuple[Process, Process], calm: list[dict[str, Any]]
) -> None:
    other, stopped = (create(stack, name, num_steps=STEPS) for name in ("other", "stopped"))
    first = start(stack, servers, stopped)
    wait_for_step(stack, stopped, STOP_AT)
    assert first.stop() == 143
    assert record(stack, stopped).state is RunState.QUEUED
    assert start(stack, servers, stopped).wait() == 0
    assert record(stack, stopped).state is RunState.SUCCEEDED
    expected = {event["step"]: numbers(event) for event in calm}
    found = steps(stack, stopped)
    assert len(expected) == STEPS
    assert {event["step"] for event in found} == set(expected)
    for event in found:
        assert numbers(event) == expected[event["step"]]
    resumed_at = min(event["step"] for event in found if event["attempt"] == 2)
    assert resumed_at > CHECKPOINT_EVERY, "it began anew"
    # It was first in the queue, but for none of them.
    assert record(stack, other).attempt == 0
    assert start(stack, servers, stopped).wait() == 0, "a run that is over already"


def test_a_paused_run_gives_its_worker_back_and_goes_on_from_where_it_stood(
    stack: Stack, servers: tuple[Process, Process], calm: list[dict[str, Any]]
) -> None:
    paused = create(stack, "paused", num_steps=STEPS)
    first = start(stack, servers, paused, "--lease-seconds", "1")
    wait_for_step(stack, paused, STOP_AT)
    stack.with_store(lambda store: store.runs.request_pause(paused))
    assert first.wait() == 0
    aside = record(stack, paused)
    assert (aside.state, aside.worker) == (RunState.PAUSED, "")
    stood_at = steps(stack, paused, follow=False)[-1]["step"]
    assert STOP_AT <= stood_at < STEPS

    async def resume(store: CartridgeStore) -> bool:
        (newest,) = [each for each in await store.versions("paused") if each.step == stood_at]
        await store.runs.request_resume(paused)
        return newest.version in await store.durable_versions("paused")

    assert stack.with_store(resume), "what it stood at is only in Redis"
    assert start(stack, servers, paused).wait() == 0
    assert record(stack, paused).state is RunState.SUCCEEDED
    found = steps(stack, paused)
    # No step twice: it was kept where it stood.
    assert [(event["step"], event["attempt"]) for event in found] == [
        (step, 1 if step <= stood_at else 2) for step in range(1, STEPS + 1)
    ]
    assert [numbers(event) for event in found] == [numbers(event) for event in calm]


def test_a_failed_run_says_why_and_is_not_tried_again(stack: Stack, servers: tuple[Process, Process]) -> None:
    run_id = create(stack, "failing", model_fingerprint="blake3:" + "0" * 64)
    assert start(stack, servers, run_id).wait() == 3
    failed = record(stack, run_id)
    assert failed.state is RunState.FAILED
    assert "FINGERPRINT_MISMATCH" in (failed.error or "")


def test_an_unknown_run_is_a_crash(stack: Stack, servers: tuple[Process, Process]) -> None:
    assert start(stack, servers, "run-absent").wait() == 1


def test_a_run_that_is_to_be_cancelled_is_not_given_back(stack: Stack, servers: tuple[Process, Process]) -> None:
    run_id = create(stack, "cancelled", num_steps=100_000)
    # Its heart beats too slowly to hear of the cancellation before the stop.
    trainer = start(stack, servers, run_id, "--lease-seconds", "600")
    wait_for_step(stack, run_id, 1)
    stack.with_store(lambda store: store.runs.request_cancel(run_id))
    assert record(stack, run_id).state is RunState.RUNNING
    trainer.stop()
    ended = record(stack, run_id)
    assert ended.state is RunState.CANCELLED
    assert ended.result is not None
    assert ended.result["step"] >= 1
