"""Waiting for what is away: one rule for every call that may be repeated."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import structlog
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_delay, wait_random_exponential

from foundry.errors import (
    AlignmentError,
    Cancelled,
    DeadlineExceeded,
    FoundryError,
    ResourceExhausted,
    StoreFull,
    StoreRefused,
    Unavailable,
)

log = structlog.get_logger(__name__)
T = TypeVar("T")

# Cancelled is what a server that is being stopped answers; the call itself was never cancelled here.
# A full storage is emptied, by a sweep or by whoever is told.
_PASSING = (Unavailable, ResourceExhausted, DeadlineExceeded, Cancelled, AlignmentError, StoreFull)


def passes(error: BaseException) -> bool:
    """Whether the same call may succeed later. Credentials don't become right by waiting."""
    return isinstance(error, _PASSING) and not isinstance(error, StoreRefused)


@dataclass
class Retry:
    """Repeats idempotent calls while their peer is away, and says what it is waiting for."""

    budget_seconds: float
    max_wait_seconds: float = 2.0
    # The longest that a peer's word is taken for when to come back: another pod may be free before.
    max_retry_after_seconds: float = 10.0
    # An answer with a wrong identity or checksum is asked for again this often; then it is an error.
    max_alignment_errors: int = 3
    # Told of every attempt that failed, by what was called and how it failed.
    on_failure: Callable[[str, FoundryError], None] | None = None
    waiting_for: str = ""

    async def call(self, what: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """`attempt()`'s result. Raises its last error when the budget is used up, and other errors at once."""
        alignment_errors, told = 0, ""

        def after(state: RetryCallState) -> None:
            nonlocal alignment_errors, told
            error = state.outcome.exception() if state.outcome else None
            alignment_errors += isinstance(error, AlignmentError)
            self.waiting_for = told = f"{what}: {error}"
            log.warning(
                "waiting",
                what=what,
                reason=getattr(error, "reason", ""),
                error=str(error),
                tries=state.attempt_number,
            )

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            told = getattr(error, "retry_after_seconds", None) or 0.0
            drawn = wait_random_exponential(multiplier=0.1, max=self.max_wait_seconds)(state)
            return max(drawn, min(told, self.max_retry_after_seconds))

        def stop(state: RetryCallState) -> bool:
            return alignment_errors > self.max_alignment_errors or stop_after_delay(self.budget_seconds)(state)

        retrying = AsyncRetrying(
            retry=retry_if_exception(passes),
            wait=wait,
            stop=stop,
            after=after,
            reraise=True,
        )

        async def trial() -> T:
            try:
                return await attempt()
            except FoundryError as error:
                if self.on_failure is not None:
                    self.on_failure(what, error)
                raise

        try:
            return await retrying(trial)
        finally:
            # Another call may wait beside this one.
            if self.waiting_for == told:
                self.waiting_for = ""
