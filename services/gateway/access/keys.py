"""All keys of the store in memory, a few seconds old at most."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import structlog

from foundry.errors import FoundryError, StoreUnavailable
from foundry.store import ApiKey, KeyStore
from foundry.store.key_store import KnownKey

log = structlog.get_logger(__name__)

# Whoever sends unknown ids costs the store no more than one listing in this time.
_MIN_SECONDS = 1.0


class Keys:
    """While the store is away the last known keys stand."""

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self._known: Mapping[str, KnownKey] = {}
        self._listing = asyncio.Lock()
        # In `time.monotonic()`: when the last listing began, and when the last one began that came to an end.
        self._began = self._as_of = -_MIN_SECONDS
        self._failed = False

    async def watch(self, period_seconds: float) -> None:
        """Look now and every `period_seconds`, until cancelled."""
        while True:
            await self._look()
            await asyncio.sleep(period_seconds)

    async def find(self, key_id: str) -> ApiKey | None:
        """None if there is no such key, or its record is damaged. Looks at the store for an unknown id, at most once a
        second for all of them. Raises StoreUnavailable if that can't be known now."""
        if key_id not in self._known:
            await self._look()
            if key_id not in self._known and self._failed:
                raise StoreUnavailable("the API keys can't be read now: the gateway's log says why")
        known = self._known.get(key_id)
        return None if known is None else known.key

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
                log.warning("api keys not read: the last known ones stand", error=error.message)
            except Exception:
                # A fault of ours, which must not end the looks without a word.
                self._failed = True
                log.exception("api keys not read: the last known ones stand")
            self._as_of = self._began
