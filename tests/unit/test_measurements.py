"""The best version is durable before it is tagged, and is the one that the tag means."""

from __future__ import annotations

from typing import Any, cast

import pytest

from foundry.store import CartridgeId
from services.trainer import measurements
from services.trainer.attempt import Attempt
from services.trainer.checkpoint import Progress
from services.trainer.measurements import Measurements
from services.trainer.publish import PolicyPublisher
from services.trainer.signals import Teachers
from services.trainer.stages import Stages
from services.trainer.update.heldout import HeldOutSet
from services.trainer.update.step import TrainingStep


class Everything:
    """An attempt, a publisher and what is measured, in one; it writes down what is asked of it."""

    lm = cartridge = None
    samples = ("one",)
    num_tokens = 1

    def __init__(self, *kls: float) -> None:
        self.kls, self.calls = list(kls), list[str]()
        self.progress = Progress(0, CartridgeId("report", 3, ""), 0, "", "", "")

    def kl(self, *unused: object) -> float:
        return self.kls[0]

    async def publish_again(self) -> CartridgeId:
        """Redis has lost version 3 meanwhile."""
        self.calls.append("publish")
        self.progress.policy = CartridgeId("report", 4, "")
        return self.progress.policy

    async def tag(self, tag: str, version: int) -> None:
        self.calls.append(f"{tag} {version}")


async def test_a_version_that_redis_lost_is_published_before_it_is_tagged(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ignore(*unused: Any) -> None:
        """Nobody follows the run."""

    monkeypatch.setattr(measurements, "report_heldout", ignore)
    every = Everything(0.5)
    heldout = cast(HeldOutSet, every)
    taken = Measurements(
        *(cast(Attempt, every), every.progress, cast(TrainingStep, every), cast(Teachers, every)),
        *(cast(PolicyPublisher, every), Stages()),
        heldout=heldout,
        general=heldout,
    )
    await taken.take()
    assert every.calls == ["publish", "best 4"]
    assert every.progress.best is not None
    assert every.progress.best.policy.version == 4
    # No better one: nothing moves.
    every.kls = [0.5]
    await taken.take()
    assert every.calls == ["publish", "best 4"]
    assert every.progress.num_no_better == 1
