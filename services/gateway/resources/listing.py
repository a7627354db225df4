"""Something about every cartridge name."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from foundry.errors import CartridgeNotFound
from foundry.store.unreadable import skipped

# Each look-up takes a connection to Redis.
_MAX_LOOKUPS = 16
T = TypeVar("T")


async def for_each(names: Sequence[str], look_up: Callable[[str], Awaitable[T]]) -> list[T]:
    """In the order of the names. Left out are those that were deleted since they were listed, and those that can't be
    read, which are logged and counted."""
    places = asyncio.Semaphore(_MAX_LOOKUPS)

    async def found(name: str) -> list[T]:
        async with places:
            with suppress(CartridgeNotFound), skipped("cartridge", name):
                return [await look_up(name)]
            return []

    return [item for items in await asyncio.gather(*map(found, names)) for item in items]
