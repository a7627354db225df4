"""What callers used in the last minute, counted in Redis for all gateways together."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog
from limits.aio.storage import MemoryStorage, RedisStorage
from redis.asyncio import Redis

from foundry.errors import FoundryError
from foundry.store.redis.connection import redis_errors
from foundry.store.redis.keys import key
from services.gateway.access.window import Window

log = structlog.get_logger(__name__)
T = TypeVar("T")

# A Redis that fails is left alone for as long: not every request is to wait for it.
_AWAY_SECONDS = 5.0
# Counts what was used already.
_NO_LIMIT = 2**53


class Counters:
    """While Redis is away each gateway counts for itself, from nothing: resident cartridges are served without Redis,
    and stay limited."""

    def __init__(self, redis: Redis, *, seconds: int = 60) -> None:
        """`seconds`: the length of a window."""
        self._seconds = seconds
        # Its annotation lacks the pool, which its documentation has.
        pool: Any = redis.connection_pool
        self._redis = RedisStorage(
            "async+redis://", implementation="redispy", key_prefix=key("limits"), connection_pool=pool
        )
        self._memory = MemoryStorage()
        self._asked_again_at = 0.0

    async def take(self, name: str, most: int) -> bool:
        """Count one more, unless that is more than `most`."""
        return await self._ask(lambda storage: storage.acquire_sliding_window_entry(name, most, self._seconds))

    async def add(self, name: str, amount: int) -> None:
        await self._ask(lambda storage: storage.acquire_sliding_window_entry(name, _NO_LIMIT, self._seconds, amount))

    async def window(self, name: str, most: int) -> Window:
        counts = await self._ask(lambda storage: storage.get_sliding_window(name, self._seconds))
        return Window(most, self._seconds, *counts)

    async def _ask(self, ask: Callable[[RedisStorage | MemoryStorage], Awaitable[T]]) -> T:
        if time.monotonic() >= self._asked_again_at:
            try:
                with redis_errors("counting"):
                    return await ask(self._redis)
            except FoundryError as error:
                self._asked_again_at = time.monotonic() + _AWAY_SECONDS
                log.warning("limits are counted by this gateway alone", error=error.message)
        return await ask(self._memory)
