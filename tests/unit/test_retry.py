"""What is waited for, what is not, and how long."""

from __future__ import annotations

import asyncio
import time

import pytest

from foundry.errors import (
    AlignmentError,
    FoundryError,
    InvalidArgument,
    PermissionDenied,
    PolicyMismatch,
    ResourceExhausted,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    Unauthenticated,
    Unavailable,
)
from foundry.rpc.retry import Retry
from services.trainer import metrics


class Flaky:
    """Fails a few times before it succeeds."""

    def __init__(self, error: FoundryError, failures: int) -> None:
        self.error, self.failures, self.calls = error, failures, 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return "done"


@pytest.mark.parametrize(
    "error", [Unavailable("away"), StoreUnavailable("away"), StoreFull("no room"), AlignmentError("other ids")]
)
async def test_what_may_pass_is_tried_again(error: FoundryError) -> None:
    retry, flaky = Retry(60, max_wait_seconds=0.001), Flaky(error, 3)
    assert await retry.call("teacher", flaky) == "done"
    assert flaky.calls == 4
    assert retry.waiting_for == ""


@pytest.mark.parametrize(("told", "waited"), [(0.02, 0.02), (60.0, 0.05)])
async def test_a_peer_says_when_to_come_back(told: float, waited: float) -> None:
    """Another one may be free before, so it is not believed for long."""
    retry = Retry(60, max_wait_seconds=0.001, max_retry_after_seconds=0.05)
    began = time.monotonic()
    assert await retry.call("rollout", Flaky(ResourceExhausted("full", retry_after_seconds=told), 2)) == "done"
    assert 2 * waited <= time.monotonic() - began < 30


async def test_wrong_answers_end_it_soon() -> None:
    flaky, refused = Flaky(AlignmentError("other ids"), 100), metrics.REFUSED.labels("ALIGNMENT")
    before = refused._value.get()
    with pytest.raises(AlignmentError, match="other ids"):
        await Retry(60, max_wait_seconds=0.001, max_alignment_errors=3, on_failure=metrics.count_failure).call(
            "teacher", flaky
        )
    assert flaky.calls == 4
    assert refused._value.get() - before == 4


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgument("bad"),
        PolicyMismatch("stale"),
        StoreRefused("no"),
        Unauthenticated("no token"),
        PermissionDenied("not yours"),
    ],
)
async def test_what_cannot_pass_is_raised_at_once(error: FoundryError) -> None:
    flaky = Flaky(error, 1)
    with pytest.raises(type(error)):
        await Retry(60).call("rollout", flaky)
    assert flaky.calls == 1


async def test_a_call_that_ends_says_nothing_of_one_that_waits_beside_it() -> None:
    retry, waiting, may_end = Retry(60, max_wait_seconds=0.001), asyncio.Event(), asyncio.Event()

    async def away() -> None:
        if retry.waiting_for and not may_end.is_set():
            waiting.set()
            await may_end.wait()
        elif not may_end.is_set():
            raise Unavailable("away")

    beside = asyncio.create_task(retry.call("rollout", away))
    await waiting.wait()
    assert await retry.call("teacher", Flaky(Unavailable("away"), 0)) == "done"
    assert retry.waiting_for == "rollout: away"
    may_end.set()
    await beside
    assert retry.waiting_for == ""


async def test_the_budget_is_an_end() -> None:
    flaky = Flaky(Unavailable("away for good"), 10**9)
    with pytest.raises(Unavailable, match="away for good"):
        await Retry(0.05, max_wait_seconds=0.01).call("rollout", flaky)
    assert flaky.calls > 1
