"""The best version is durable before it is tagged, and is the one that the tag means."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from foundry.store import CartridgeId
from services.trainer import measurements
from services.trainer.attempt import Attempt
from services.trainer.checkpoint import Progress
from services.trainer.measurements import Measurements
from services.trainer.publish import PolicyPublisher
from services.trainer.signals import Teachers
from services.trainer.update.heldout import Distance, HeldOutSet
from services.trainer.update.step import TrainingStep


class Everything:
    """An attempt, a publisher and what is measured, in one; it writes down what is asked of it."""

    lm = cartridge = None
    samples = ("one",)
    num_tokens = 1

    def __init__(self, *found: Distance, is_surer: bool = False) -> None:
        self.found, self.calls = list(found), list[str]()
        self.progress = Progress(0, CartridgeId("report", 3, ""), 0, "", "", "")
        self.spec = SimpleNamespace(is_surer=is_surer)

    def distance(self, *unused: object) -> Distance:
        return self.found[0]

    async def publish_again(self) -> CartridgeId:
        """Redis has lost version 3 meanwhile."""
        self.calls.append("publish")
        self.progress.policy = CartridgeId("report", 4, "")
        return self.progress.policy

    async def tag(self, tag: str, version: int) -> None:
        self.calls.append(f"{tag} {version}")


def measurements_of(every: Everything) -> Measurements:
    heldout = cast(HeldOutSet, every)
    return Measurements(
        *(cast(Attempt, every), every.progress, cast(TrainingStep, every), cast(Teachers, every)),
        cast(PolicyPublisher, every),
        heldout=heldout,
        general=heldout,
    )


@pytest.fixture(autouse=True)
def nobody_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ignore(*unused: Any) -> None:
        pass

    monkeypatch.setattr(measurements, "report_heldout", ignore)


@pytest.mark.parametrize(("is_surer", "best_step"), [(False, 0), (True, 1)])
async def test_what_is_to_be_surer_than_its_teacher_is_judged_by_likelihood(is_surer: bool, best_step: int) -> None:
    every = Everything(Distance(kl=0.1, nll=0.9), is_surer=is_surer)
    taken = measurements_of(every)
    await taken.take()
    every.progress.step, every.found = 1, [Distance(kl=0.2, nll=0.7)]
    await taken.take()
    assert every.progress.best is not None
    assert every.progress.best.step == best_step


async def test_a_version_that_redis_lost_is_published_before_it_is_tagged() -> None:
    every = Everything(Distance(0.5, 0.5))
    taken = measurements_of(every)
    await taken.take()
    assert every.calls == ["publish", "best 4"]
    assert every.progress.best is not None
    assert every.progress.best.policy.version == 4
    # No better one: nothing moves.
    await taken.take()
    assert every.calls == ["publish", "best 4"]
    assert every.progress.num_no_better == 1
