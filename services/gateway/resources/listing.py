"""Lists: a page of them, and something about every cartridge name."""

from __future__ import annotations

import asyncio
from bisect import bisect
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Annotated, Literal, TypeVar

from fastapi import Query
from pydantic import BaseModel

from foundry.errors import CartridgeNotFound
from foundry.store.unreadable import skipped

# Each look-up takes a connection to Redis.
_MAX_LOOKUPS = 16
T = TypeVar("T")

PAGE, MAX_PAGE = 100, 1000
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Most entries of the page.")]
After = Annotated[str, Query(max_length=256, description="`last_id` of the page before.")]


class Listing(BaseModel):
    """A page of a list, as OpenAI's: what follows is asked for with `after=last_id`.

    What can't be read is left out, so that a page may have fewer entries than there is more.
    """

    object: Literal["list"] = "list"
    has_more: bool
    last_id: str | None
    """Of the page's last entry, if there is more."""


def page_of_names(names: Sequence[str], after: str, limit: int) -> tuple[Sequence[str], str | None]:
    """Of sorted names those that follow, and where the next page begins. A name that is gone has its place yet."""
    begin = bisect(names, after)
    some = names[begin : begin + limit]
    return some, some[-1] if begin + limit < len(names) else None


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
