"""The worker: its heart beats as long as the run is ours, and what has ended is written down whatever happens."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from foundry.errors import Fenced, StoreUnavailable
from foundry.model.lm import FrozenLM
from foundry.rpc.retry import Retry
from foundry.store import CartridgeStore, ClaimedRun, Desired, RunState
from services.trainer.active import ActiveRun
from services.trainer.attempt import Attempt
from services.trainer.control import Control
from services.trainer.heartbeat import Heartbeat
from services.trainer.run import Run
from services.trainer.settings import TrainerSettings
from services.trainer.worker import Worker
from tests.store_data import run_spec

CLAIMED = ClaimedRun(run_id="run-a", attempt=1, spec=run_spec(), desired=Desired.CONTINUE)


def store_of(runs: object) -> CartridgeStore:
    return cast(CartridgeStore, SimpleNamespace(runs=runs))


def active_run(runs: object) -> ActiveRun:
    return ActiveRun(Attempt(CLAIMED, store_of(runs), Retry(1.0)), Control())


class Runs:
    """Answers heartbeats from a list."""

    def __init__(self, *answers: Desired | Exception) -> None:
        self.left = list(answers)

    async def heartbeat(self, *_: object, **__: object) -> Desired:
        answer = self.left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize("fault", [StoreUnavailable("away"), RuntimeError("a fault of ours")])
async def test_the_heart_beats_on_after_a_failure(fault: Exception) -> None:
    runs = Runs(Desired.CONTINUE, fault, Desired.PAUSE, Fenced("another has it"))
    active = active_run(runs)
    heart = Heartbeat(active, lease_seconds=0.001)
    await asyncio.wait_for(heart.beat(), 5)
    assert runs.left == []
    assert active.control.paused
    assert isinstance(heart.abandoned.result(), Fenced)


@pytest.mark.parametrize("waiting_for", ["", "rollout: away"])
async def test_a_cancelled_run_ends_its_step_unless_there_is_none_to_end(waiting_for: str) -> None:
    active = active_run(Runs(Desired.CANCEL, Fenced("another has it")))
    active.run = cast(Run, object())
    active.attempt.retry.waiting_for = waiting_for
    heart = Heartbeat(active, lease_seconds=0.001)
    await asyncio.wait_for(heart.beat(), 5)
    assert active.control.cancelled
    # What came first counts: while it trains, that is the other worker.
    assert (heart.abandoned.result() is None) == bool(waiting_for)


class SlowRuns:
    """Redis knows the end, object storage takes its time."""

    def __init__(self) -> None:
        self.begun, self.may_end = asyncio.Event(), asyncio.Event()
        self.written = False

    async def finish(self, *_: object, **__: object) -> None:
        self.begun.set()
        await self.may_end.wait()
        self.written = True


async def test_a_worker_that_is_stopped_while_it_ends_a_run_writes_the_end() -> None:
    runs = SlowRuns()
    settings = cast(TrainerSettings, SimpleNamespace(grace_seconds=5.0))
    worker = Worker(cast(FrozenLM, None), settings, store_of(runs))
    finishing = asyncio.create_task(worker._finish(active_run(runs), RunState.FAILED, "why"))
    await runs.begun.wait()
    finishing.cancel()
    asyncio.get_running_loop().call_soon(runs.may_end.set)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(finishing, 10)
    assert runs.written
    assert worker.ended is RunState.FAILED
