"""A store with versions to lose."""

from __future__ import annotations

import pytest

from foundry.store import CartridgeStore
from tests.contract.redis_loss.versions import publish


@pytest.fixture
async def filled(store: CartridgeStore) -> CartridgeStore:
    """Versions 1 (tagged best), 2 and 4 of `report` are durable, 3 and 5 are hot."""
    await store.acquire("report", "run-a", 1)
    for step in range(5):
        await publish(store, step, durable=step in (0, 1, 3))
    await store.tag("report", "best", 1)
    return store
