"""Random SIGKILLs over trainers, rollout servers, the teacher and Valkey while one run trains.

`FOUNDRY_KILLS` says how many (20 unless told; `make kills` asks for 200), `FOUNDRY_KILLS_SEED` which ones.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from foundry.identity import CartridgeBytes, content_digest
from foundry.store import CartridgeStore, RunState
from tests.chaos.killer import MAX_GAP_STEPS, Kill, Killer
from tests.chaos.supervisor import KilledService, KilledValkey
from tests.chaos.witness import Witness
from tests.e2e.training import create_run, numbers, step_events
from tests.process import Process
from tests.services import Stack, wait_serving

KILLS = int(os.environ.get("FOUNDRY_KILLS", "20"))
SEED = int(os.environ.get("FOUNDRY_KILLS_SEED", "0"))
# More than the killer waits for, so that the run outlives it.
STEPS = (MAX_GAP_STEPS + 1) * KILLS
LEASE_SECONDS = 1.0

pytestmark = pytest.mark.timeout(120 + 15 * KILLS)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path, persistent_valkey=True, recovery_lease_seconds=LEASE_SECONDS)
    asyncio.run(stack.valkey.start())
    yield stack
    stack.close()


def start_services(stack: Stack) -> dict[str, list[Process]]:
    """Two rollout servers that share every batch, one teacher, and a second trainer that stands by."""
    model = ("--model", str(stack.model))
    rollouts = [stack.rollout() for _ in range(2)]
    teacher = stack.spawn("teacher", *model)
    addresses = ",".join(rollout.address for rollout in rollouts)
    peers = ("--rollout-addresses", addresses, "--teacher-address", teacher.address)
    lease = ("--lease-seconds", str(LEASE_SECONDS))
    trainers = [stack.spawn("trainer", *model, *peers, *lease, "--worker", f"trainer-{index}") for index in range(2)]
    services = {"rollout": rollouts, "teacher": [teacher], "trainer": trainers}
    for processes in services.values():
        for process in processes:
            wait_serving(process)
    return services


async def train(store: CartridgeStore, name: str) -> str:
    """A run whose every step is kept and whose versions are mostly in Redis alone."""
    return await create_run(store, name, num_steps=STEPS, checkpoint_every=1, durable_every=5)


def test_a_run_survives_random_kills(stack: Stack) -> None:
    services = start_services(stack)

    async def calm(store: CartridgeStore) -> dict[int, dict[str, Any]]:
        return {event["step"]: event async for event in step_events(store, await train(store, "calm"))}

    async def disturbed(store: CartridgeStore) -> tuple[Witness, list[Kill], str]:
        empties = KilledValkey("valkey-emptied", stack.valkey, loses_data=True)
        keeps = KilledValkey("valkey-kept", stack.valkey, loses_data=False)
        victims = {
            kind: [KilledService(f"{kind}-{index}", process) for index, process in enumerate(processes)]
            for kind, processes in services.items()
        }
        witness = Witness(store, "disturbed", lambda: empties.losses)
        run_id = await train(store, "disturbed")

        async def at_work() -> str:
            return (await store.runs.get(run_id)).worker

        killer = Killer(
            {**victims, "valkey": [empties, keeps]},
            seed=SEED,
            step_seconds=statistics.median(event["seconds"]["total"] for event in expected.values()),
            current_step=lambda: witness.step,
            wait_for_steps=witness.wait_for_steps,
            at_work=at_work,
        )
        killing = asyncio.create_task(killer.kill(KILLS))
        try:
            await asyncio.gather(witness.watch(run_id), killing)
        finally:
            print(*killer.kills, sep="\n")
            killing.cancel()
            for victim in (each for group in victims.values() for each in group):
                await victim.close()
        return witness, killer.kills, run_id

    expected = stack.with_store(calm)
    assert list(expected) == list(range(1, STEPS + 1))
    witness, kills, run_id = stack.with_store(disturbed)

    assert witness.finished is not None
    assert witness.finished["state"] == RunState.SUCCEEDED, witness.finished
    assert len(kills) == KILLS
    assert max(kill.step for kill in kills) < STEPS, "the run was over before the last kill"
    check_steps(witness, expected)
    check_versions(witness)
    stack.with_store(lambda store: check_end(store, run_id, expected[STEPS]["digest"]))
    check_objects(stack.directory / "objects", run_id, most_left_over=KILLS)
    running = [process for processes in services.values() for process in processes]
    for process in running:
        process.check_alive()
    pids = [process.pid for process in running]
    stack.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    if path := os.environ.get("FOUNDRY_KILLS_RESULT"):
        Path(path).write_text(json.dumps(result(kills, witness), indent=2) + "\n")


def result(kills: list[Kill], witness: Witness) -> dict[str, Any]:
    """What happened, for the record."""
    return {
        "seed": SEED,
        "kills": dict(sorted(Counter(kill.victim for kill in kills).items())),
        "seconds": kills[-1].seconds,
        "steps": STEPS,
        "steps_reported_twice": len(witness.steps) - STEPS,
        "attempts": max(event["attempt"] for event in witness.steps),
        "last_version": witness.steps[-1]["version"],
    }


def check_steps(witness: Witness, expected: dict[int, dict[str, Any]]) -> None:
    """Every number is the calm run's, and an attempt repeats at most the last step of those before it."""
    for event in witness.steps:
        assert numbers(event) == numbers(expected[event["step"]])
    furthest: dict[int, int] = {}
    for event in witness.steps:
        step, attempt = event["step"], event["attempt"]
        earlier = max((furthest[each] for each in furthest if each < attempt), default=0)
        assert step >= earlier, f"attempt {attempt} computed step {step} again, after step {earlier} was reported"
        # A report whose answer was lost is sent again.
        assert step >= furthest.get(attempt, 0)
        furthest[attempt] = step
    assert witness.steps[-1]["step"] == STEPS


def check_versions(witness: Witness) -> None:
    """A version is one digest for ever, and numbers only grow, also over losses of Redis."""
    reused = {version: digests for version, digests in witness.digests.items() if len(digests) > 1}
    assert not reused
    assert witness.announced == sorted(set(witness.announced))
    reported = [event["version"] for event in witness.steps]
    assert reported == sorted(reported)
    # What was only in Redis is gone with it: only then does the name mean an older version for a while.
    assert witness.resolved == sorted(witness.resolved)


async def check_end(store: CartridgeStore, run_id: str, digest: str) -> None:
    latest = await store.resolve("disturbed")
    assert latest.digest == digest
    assert latest.version in await store.durable_versions("disturbed")
    (await store.fetch(digest)).verify(digest)
    record = await store.runs.get(run_id)
    assert record.result is not None
    assert (record.result["step"], record.result["digest"]) == (STEPS, digest)
    kept = await store.runs.load_checkpoint(run_id)
    assert kept is not None
    assert kept[0] == STEPS


def check_objects(objects: Path, run_id: str, *, most_left_over: int) -> None:
    """Every object that can be listed is whole; a killed writer may leave one that can't."""
    left_over = [path for path in objects.rglob("*") if re.search(r"#\d+$", path.name)]
    assert len(left_over) <= most_left_over
    checkpoints = [path for path in (objects / "runs" / run_id / "checkpoints").iterdir() if path not in left_over]
    assert sorted(path.suffix for path in checkpoints) == [".json", ".json", ".safetensors", ".safetensors"]
    assert len({path.stem for path in checkpoints}) == 2
    for blob in (objects / "blobs" / "blake3").glob("*.safetensors"):
        CartridgeBytes.from_file(memoryview(blob.read_bytes())).verify(f"blake3:{blob.stem}")
    for document in (objects / "documents").glob("*.txt"):
        assert content_digest(document.read_bytes()) == f"blake3:{document.stem}"
