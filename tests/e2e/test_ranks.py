"""A run that two ranks train, started as Jobs start them: one pod of two ranks, and two pods of one."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foundry.store import CartridgeStore, RunState
from services.trainer.exits import FAILED, RANK_LOST
from tests.e2e.training import create_run, numbers, spawn_trainer, start_servers, step_events
from tests.process import Process
from tests.services import START_SECONDS, Stack

pytestmark = pytest.mark.timeout(600)

# Enough steps for a kill to come before the last.
STEPS, KILL_AT = 30, 5
# Longer than the ranks need to start one after the other on a busy machine.
RANK_TIMEOUT_SECONDS = 20


class Pods:
    """The launchers of one attempt at a run, each as in a pod of its own."""

    def __init__(
        self, stack: Stack, servers: tuple[Process, Process], run_id: str, *arguments: str, num_pods: int
    ) -> None:
        port = str(stack.free_port())
        self.launchers = []
        for index in range(num_pods):
            variables = {"PET_NPROC_PER_NODE": str(2 // num_pods)}
            if num_pods > 1:
                variables |= {"PET_NNODES": "2", "PET_NODE_RANK": str(index)}
                variables |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
            with pytest.MonkeyPatch.context() as patch:
                for name, value in variables.items():
                    patch.setenv(name, value)
                self.launchers.append(
                    spawn_trainer(stack, *servers, "--run", run_id, *arguments, module="services.trainer.launch")
                )

    def wait(self) -> list[int]:
        return [launcher.wait() for launcher in self.launchers]

    def pid(self, rank: int) -> int:
        return self._ranks()[rank]

    def kill_pod(self, index: int) -> None:
        """All its processes at once."""
        launcher = self.launchers[index]
        ranks = _children(launcher.pid)
        launcher.kill()
        for pid in ranks.values():
            os.kill(pid, signal.SIGKILL)

    def _ranks(self) -> dict[int, int]:
        return {rank: pid for launcher in self.launchers for rank, pid in _children(launcher.pid).items()}


def _children(parent: int) -> dict[int, int]:
    """Pids of the ranks that a launcher has started."""
    pids = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in pids}
    return {
        int(entry.removeprefix(b"RANK=")): pid
        for pid, entries in environments.items()
        for entry in entries
        if entry.startswith(b"RANK=")
    }


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("ranks"))
    asyncio.run(stack.valkey.start())
    yield stack
    stack.close()


@pytest.fixture(scope="module")
def servers(stack: Stack) -> tuple[Process, Process]:
    return start_servers(stack)


def create(stack: Stack, name: str, **changes: Any) -> str:
    return stack.with_store(lambda store: create_run(store, name, **{"num_steps": STEPS, **changes}))


def wait_for_step(stack: Stack, run_id: str, step: int) -> None:
    async def wait(store: CartridgeStore) -> None:
        async with asyncio.timeout(2 * START_SECONDS):
            async for event in step_events(store, run_id):
                if event["step"] == step:
                    return

    stack.with_store(wait)


def state(stack: Stack, run_id: str) -> RunState:
    return stack.with_store(lambda store: store.runs.get(run_id)).state


def steps(stack: Stack, run_id: str, *, follow: bool = True) -> list[dict[str, Any]]:
    async def read(store: CartridgeStore) -> list[dict[str, Any]]:
        return [event async for event in step_events(store, run_id, follow=follow)]

    return stack.with_store(read)


@pytest.fixture(scope="module")
def undisturbed(stack: Stack, servers: tuple[Process, Process]) -> dict[int, dict[str, Any]]:
    run_id = create(stack, "calm")
    assert Pods(stack, servers, run_id, num_pods=1).wait() == [0]
    return {event["step"]: numbers(event) for event in steps(stack, run_id)}


def check_resumed(stack: Stack, run_id: str, undisturbed: dict[int, dict[str, Any]]) -> None:
    found = steps(stack, run_id)
    assert {event["step"] for event in found} == set(undisturbed)
    for event in found:
        assert numbers(event) == undisturbed[event["step"]]
    assert min(event["step"] for event in found if event["attempt"] > 1) > 1, "it began anew"


def test_a_killed_follower_ends_its_pod_and_the_next_goes_on(
    stack: Stack, servers: tuple[Process, Process], undisturbed: dict[int, dict[str, Any]]
) -> None:
    run_id = create(stack, "follower-killed")
    pods = Pods(stack, servers, run_id, num_pods=1)
    wait_for_step(stack, run_id, KILL_AT)
    os.kill(pods.pid(1), signal.SIGKILL)
    assert pods.wait() == [128 + signal.SIGKILL]
    assert state(stack, run_id) is RunState.QUEUED, "it was not given back"
    assert Pods(stack, servers, run_id, num_pods=1).wait() == [0]
    check_resumed(stack, run_id, undisturbed)


def test_pods_end_with_any_of_them_and_go_on_together(
    stack: Stack, servers: tuple[Process, Process], undisturbed: dict[int, dict[str, Any]]
) -> None:
    run_id = create(stack, "pods-killed")
    for killed, kill_at in ((1, KILL_AT), (0, 3 * KILL_AT)):
        pods = Pods(stack, servers, run_id, num_pods=2)
        wait_for_step(stack, run_id, kill_at)
        pods.kill_pod(killed)
        assert pods.launchers[1 - killed].wait() == RANK_LOST
    pods = Pods(stack, servers, run_id, num_pods=2)
    assert pods.wait() == [0, 0]
    check_resumed(stack, run_id, undisturbed)


def test_a_failed_run_fails_every_pod_alike(stack: Stack, servers: tuple[Process, Process]) -> None:
    run_id = create(stack, "failing", model_fingerprint="blake3:" + "0" * 64)
    assert Pods(stack, servers, run_id, num_pods=2).wait() == [FAILED, FAILED]
    assert state(stack, run_id) is RunState.FAILED


def test_ranks_wait_for_one_another_as_long_as_they_live(stack: Stack, servers: tuple[Process, Process]) -> None:
    run_id = create(stack, "waiting", num_steps=100_000)
    pods = Pods(stack, servers, run_id, "--rank-timeout-seconds", str(RANK_TIMEOUT_SECONDS), num_pods=2)
    wait_for_step(stack, run_id, 1)
    rollout, _ = servers
    rollout.freeze()
    time.sleep(1.2 * RANK_TIMEOUT_SECONDS)
    step = steps(stack, run_id, follow=False)[-1]["step"]
    rollout.thaw()
    wait_for_step(stack, run_id, step + 1)
    follower = pods.pid(1)
    os.kill(follower, signal.SIGSTOP)
    assert pods.launchers[0].wait() == RANK_LOST
    assert state(stack, run_id) is RunState.QUEUED, "it was not given back"
    os.kill(follower, signal.SIGCONT)
    assert pods.launchers[1].wait() == RANK_LOST
