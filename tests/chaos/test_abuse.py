"""A whole stack under mixed abuse: nothing that its processes hold grows, and who behaves gets right answers.

`FOUNDRY_ABUSE` says for how long (30 unless told; `make abuse` asks for an hour), `FOUNDRY_ABUSE_SEED` which.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest
from redis.asyncio import Redis

from foundry.client import FoundryClient
from foundry.errors import ResourceExhausted
from foundry.store import CartridgeStore
from foundry.store.api_keys import Scope
from foundry.tasks import end
from tests.chaos.abuse import Abuse
from tests.e2e.training import start_trainer
from tests.process import Process
from tests.services import Stack, wait_ready

SECONDS = float(os.environ.get("FOUNDRY_ABUSE", "30"))
SEED = int(os.environ.get("FOUNDRY_ABUSE_SEED", "0"))
ABUSERS = 12
SAMPLES = 60
QUESTION = "What is open?"

pytestmark = pytest.mark.timeout(300 + 2 * SECONDS)


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds at one time."""

    memory_bytes: int
    descriptors: int
    threads: int


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    # Few enough for what runs publish to fill it soon.
    stack = Stack(tmp_path, environment={"FOUNDRY_CARTRIDGE_BUDGET_BYTES": str(2**20)})
    asyncio.run(stack.valkey.start())
    yield stack
    stack.close()


def test_nothing_grows_and_answers_stay_right(stack: Stack) -> None:
    rollout, teacher, trainer = start_trainer(stack)
    gateway = stack.gateway(
        *([rollout], "--teacher-address", teacher.address, "--max-connections", "64", "--max-upload-seconds", "2"),
        *("--api-keys", "--limits.concurrent-runs", "16"),
    )
    wait_ready(gateway)
    stack.publish("polite/kept", stack.cartridge(1))
    keys = stack.with_store(make_keys)
    processes = {"gateway": gateway, "rollout": rollout, "teacher": teacher, "trainer": trainer}
    watched = {name: psutil.Process(process.pid) for name, process in processes.items()}
    abuse = Abuse(stack, gateway, rollout, teacher, keys=[keys["acme"], keys["globex"]], seed=SEED)
    polite = Polite(gateway, keys["polite"])
    found = asyncio.run(watch(stack, abuse, polite, watched))
    for process in processes.values():
        process.check_alive()
    result = summary(found, abuse, polite)
    print(json.dumps(result, indent=1))
    if path := os.environ.get("FOUNDRY_ABUSE_RESULT"):
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
    for name, samples in found.items():
        check_flat(name, samples)
    assert polite.num_answers > 0
    assert all(abuse.kinds[act.__name__] for act in abuse.acts), abuse.kinds


async def make_keys(store: CartridgeStore) -> dict[str, str]:
    """One for each tenant, with all scopes."""
    return {
        tenant: (await store.api_keys.create(tenant=tenant, scopes=get_args(Scope)))[1]
        for tenant in ("acme", "globex", "polite")
    }


class Polite:
    """One who asks the same again and again, and knows the answer."""

    def __init__(self, gateway: Process, key: str) -> None:
        self._url, self._key = f"http://{gateway.address}", key
        self.num_answers = self.num_refused = 0

    async def ask(self) -> None:
        """Until cancelled."""
        with FoundryClient(self._url, timeout_seconds=120, api_key=self._key) as client:
            expected = await asyncio.to_thread(self._answer, client)
            while True:
                try:
                    assert await asyncio.to_thread(self._answer, client) == expected
                    self.num_answers += 1
                except ResourceExhausted as error:
                    self.num_refused += 1
                    await asyncio.sleep(error.retry_after_seconds or 1.0)

    def _answer(self, client: FoundryClient) -> str:
        return client.chat("kept@1", QUESTION, temperature=0, max_tokens=8).text


async def watch(
    stack: Stack, abuse: Abuse, polite: Polite, watched: dict[str, psutil.Process]
) -> dict[str, list[dict[str, int]]]:
    """What everybody holds, `SAMPLES` times."""
    found: dict[str, list[dict[str, int]]] = {name: [] for name in (*watched, "redis")}
    tasks = [asyncio.create_task(abuse.go_on()) for _ in range(ABUSERS)] + [asyncio.create_task(polite.ask())]
    began = time.monotonic()
    try:
        for number in range(1, SAMPLES + 1):
            await asyncio.sleep(max(0.0, began + number * SECONDS / SAMPLES - time.monotonic()))
            for task in tasks:
                if task.done():
                    task.result()
            for name, process in watched.items():
                found[name].append(asdict(held(process)))
            found["redis"].append(await redis_held(stack))
    finally:
        await end(*tasks)
        await abuse.close()
    return found


def held(process: psutil.Process) -> Held:
    with process.oneshot():
        return Held(process.memory_full_info().uss, process.num_fds(), process.num_threads())


async def redis_held(stack: Stack) -> dict[str, int]:
    """Fences of runs that were deleted are left out: each stays for a day."""
    async with Redis.from_url(stack.valkey.url) as redis:
        runs = [key async for key in redis.scan_iter("foundry:run:*", count=1000)]
        async with redis.pipeline(transaction=False) as pipe:
            for key in runs:
                pipe.hexists(key, "deleted")
            num_fences = sum(await pipe.execute())
        return {"keys": await redis.dbsize() - num_fences}


def check_flat(name: str, samples: list[dict[str, int]]) -> None:
    """The last quarter holds no more than the second: before that, what is made once is made."""
    for what in samples[0]:
        early, late = (quarter([each[what] for each in samples], number) for number in (1, 3))
        slack = 0.1 * early + (32 * 2**20 if what == "memory_bytes" else 32)
        assert late <= early + slack, f"{name} holds {late} {what}, earlier {early}"


def quarter(values: list[int], number: int) -> float:
    """The median of one of the four quarters, from 0."""
    length = len(values) // 4
    return statistics.median(values[number * length : (number + 1) * length])


def summary(found: dict[str, list[dict[str, int]]], abuse: Abuse, polite: Polite) -> dict[str, Any]:
    """For the record: medians of the four quarters."""
    return {
        "seed": SEED,
        "seconds": SECONDS,
        "acts": dict(sorted(abuse.kinds.items())),
        "statuses": dict(sorted(abuse.statuses.items())),
        "polite": {"answers": polite.num_answers, "refused": polite.num_refused},
        "held": {
            name: {
                what: [quarter([each[what] for each in samples], number) for number in range(4)] for what in samples[0]
            }
            for name, samples in found.items()
        },
    }
