"""The worker's heart: it must beat as long as the run is ours, whatever happens, and stop when it is another's."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from foundry.errors import Fenced, StoreUnavailable
from foundry.lm import FrozenLM
from foundry.store import CartridgeStore, ClaimedRun, Desired
from services.trainer.control import Control
from services.trainer.patience import Patience
from services.trainer.settings import TrainerSettings
from services.trainer.worker import Hand, Worker
from tests.store_data import run_spec


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
    worker = Worker(
        cast(FrozenLM, None),
        cast(TrainerSettings, SimpleNamespace(lease_seconds=0.001)),
        cast(CartridgeStore, SimpleNamespace(runs=runs)),
    )
    abandoned: list[bool] = []
    control, lost = Control(), asyncio.Event()
    hand = Hand(
        ClaimedRun(run_id="run-a", attempt=1, spec=run_spec(), desired=Desired.CONTINUE), control, Patience(1.0)
    )
    beating: Any = worker._heartbeat(hand, lambda: abandoned.append(True), lost)
    await asyncio.wait_for(beating, 5)
    assert runs.left == []
    assert control.paused
    assert lost.is_set()
    assert abandoned == [True]
