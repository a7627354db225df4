"""The worker: its heart beats as long as the run is ours, and what has ended is written down whatever happens."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from foundry.errors import Fenced, StoreUnavailable
from foundry.model.lm import FrozenLM
from foundry.rpc.retry import Retry
from foundry.store import CartridgeStore, ClaimedRun, Desired, RunState
from services.trainer.control import Control
from services.trainer.settings import TrainerSettings
from services.trainer.worker import Hand, Worker
from tests.store_data import run_spec

CLAIMED = ClaimedRun(run_id="run-a", attempt=1, spec=run_spec(), desired=Desired.CONTINUE)


def worker_of(runs: object) -> Worker:
    return Worker(
        cast(FrozenLM, None),
        cast(TrainerSettings, SimpleNamespace(lease_seconds=0.001, grace_seconds=5.0)),
        cast(CartridgeStore, SimpleNamespace(runs=runs)),
    )


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
    worker = worker_of(runs)
    abandoned: list[bool] = []
    control, lost = Control(), asyncio.Event()
    hand = Hand(CLAIMED, control, Retry(1.0))
    beating: Any = worker._heartbeat(hand, lambda: abandoned.append(True), lost)
    await asyncio.wait_for(beating, 5)
    assert runs.left == []
    assert control.paused
    assert lost.is_set()
    assert abandoned == [True]


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
    worker = worker_of(runs)
    finishing = asyncio.create_task(worker._finish(Hand(CLAIMED, Control(), Retry(1.0)), RunState.FAILED, "why"))
    await runs.begun.wait()
    finishing.cancel()
    asyncio.get_running_loop().call_soon(runs.may_end.set)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(finishing, 10)
    assert runs.written
    assert worker.ended is RunState.FAILED
