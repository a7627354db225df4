"""Holding a name for as long as one publication takes, where no run does."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from foundry.errors import Fenced, StoreUnavailable

if TYPE_CHECKING:
    from foundry.store.cartridges import CartridgeStore

# Longer than it takes to copy a cartridge.
HOLD_SECONDS = 600.0


@asynccontextmanager
async def holding(store: CartridgeStore, name: str, purpose: str) -> AsyncIterator[str]:
    """The id of the run that holds `name`, in its first attempt; `purpose` is its first word. Raises Conflict while
    another run holds the name.
    """
    run = f"{purpose}-{uuid.uuid4().hex[:8]}"
    # With an end, because nobody takes over from a process that dies in it.
    await store.acquire(name, run, 1, hold_seconds=HOLD_SECONDS)
    try:
        yield run
    finally:
        # Not released, it ends by itself; taken over, it is over.
        with suppress(Fenced, StoreUnavailable):
            await store.release(name, run, 1)
