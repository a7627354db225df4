"""Records of the store in memory, a few seconds old at most."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

import structlog

from foundry.errors import FoundryError
from foundry.store.objects.known import Known

log = structlog.get_logger(__name__)

# However often it is asked, the store is listed no more than once in this time.
_MIN_SECONDS = 1.0
T = TypeVar("T")


class Records(Protocol[T]):
    async def refreshed(self, known: Mapping[str, Known[T]]) -> dict[str, Known[T]]:
        """All records by key."""
        ...


class Remembered(Generic[T]):
    """While the store is away the last known records stand."""

    def __init__(self, what: str, store: Records[T]) -> None:
        self._what = what
        self._store = store
        self._known: Mapping[str, Known[T]] = {}
        self._listing = asyncio.Lock()
        # In `time.monotonic()`: when the last listing began, and when the last one began that came to an end.
        self._began = self._as_of = -_MIN_SECONDS
        self._failed = False

    async def watch(self, period_seconds: float) -> None:
        """Look now and every `period_seconds`, until cancelled."""
        while True:
            await self._look()
            await asyncio.sleep(period_seconds)

    async def _look(self) -> None:
        """One listing, begun after this call, for all who wait for it."""
        asked = time.monotonic()
        async with self._listing:
            if self._as_of > asked:
                return
            await asyncio.sleep(max(0.0, self._began + _MIN_SECONDS - time.monotonic()))
            self._began = time.monotonic()
            try:
                self._known, self._failed = await self._store.refreshed(self._known), False
            except FoundryError as error:
                self._failed = True
                log.warning("not read: the last known ones stand", what=self._what, error=error.message)
            except Exception:
                # A fault of ours, which must not end the looks without a word.
                self._failed = True
                log.exception("not read: the last known ones stand", what=self._what)
            self._as_of = self._began
