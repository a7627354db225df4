"""A run over names that stand for several pods, which come and go while it trains."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foundry.identity import content_digest
from foundry.rpc.pods import rendezvous
from foundry.store import CartridgeStore, RunState
from tests.e2e.training import DOCUMENT, create_run
from tests.process import Process
from tests.services import Stack, wait_serving

FIRST, SECOND, THIRD = "127.0.0.2", "127.0.0.3", "127.0.0.4"

pytestmark = pytest.mark.timeout(240)


class Hosts:
    """The trainer's name server."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._numbers: dict[str, list[str]] = {}

    def set(self, name: str, *processes: Process) -> None:
        self._numbers[name] = [process.address.rpartition(":")[0] for process in processes]
        fresh = self.file.with_suffix(".new")
        fresh.write_text(json.dumps(self._numbers))
        fresh.replace(self.file)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    return Hosts(tmp_path_factory.mktemp("hosts") / "hosts.json")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, hosts: Hosts) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("pods"), environment={"FOUNDRY_TEST_HOSTS": str(hosts.file)})
    asyncio.run(stack.valkey.start())
    yield stack
    stack.close()


def test_pods_come_and_go_and_one_lies(stack: Stack, hosts: Hosts) -> None:
    port, teacher_port = stack.free_port(), stack.free_port()
    rollouts = [stack.rollout(address=f"{number}:{port}") for number in (FIRST, SECOND)]
    liar = stack.rollout(module="tests.e2e.stale_rollout", address=f"{THIRD}:{port}")
    teachers = [
        stack.spawn("teacher", "--model", str(stack.model), address=f"{number}:{teacher_port}")
        for number in (FIRST, SECOND)
    ]
    hosts.set("rollout.test", rollouts[0])
    hosts.set("teacher.test", *teachers)
    trainer = stack.spawn(
        "trainer",
        *("--model", str(stack.model), "--rollout-addresses", f"rollout.test:{port}"),
        *("--teacher-address", f"teacher.test:{teacher_port}"),
        module="tests.e2e.trainer_with_hosts",
    )
    for process in (*rollouts, liar, *teachers, trainer):
        wait_serving(process)

    first, second = (process.address for process in rollouts)
    home = max(teachers, key=lambda process: rendezvous(content_digest(DOCUMENT.encode()), process.address))
    answered: list[set[str]] = []

    def on(servers: set[str]) -> None:
        """What is done when a step was answered by other servers than the one before."""
        answered.append(servers)
        if servers == {first}:
            hosts.set("rollout.test", *rollouts)
        elif servers == {first, second}:
            # Gone, while the names still know them.
            rollouts[0].kill()
            home.kill()
        elif servers == {second}:
            hosts.set("rollout.test", rollouts[1], liar)

    async def run(store: CartridgeStore) -> dict[str, Any]:
        run_id = await create_run(store, "scaled", num_steps=10_000, checkpoint_every=1000, durable_every=1000)
        async for _, event in store.runs.events(run_id):
            if event["type"] == "step":
                servers = set(event["policy_mismatch_by_server"])
                if servers not in answered[-1:]:
                    on(servers)
        return event

    finished = stack.with_store(run)
    assert answered[:3] == [{first}, {first, second}, {second}]
    # The first version that it was asked for it had right.
    assert answered[3:] in ([], [{second, liar.address}])

    # The one that lies is named by its own address, not by the name that it shares with the others.
    assert finished["state"] == RunState.FAILED
    assert f"Rollout {liar.address} claimed version" in finished["error"]
    assert second not in finished["error"]
    assert "1 of 2 rollout servers" in finished["error"]
