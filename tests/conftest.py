"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from foundry.store import CartridgeStore, StoreSettings
from tests.valkey import Valkey


@pytest.fixture
async def valkey(tmp_path: Path) -> AsyncIterator[Valkey]:
    """A running, empty Valkey server."""
    server = Valkey(tmp_path)
    await server.start()
    yield server
    server.close()


@pytest.fixture
def store_settings(valkey: Valkey, tmp_path: Path) -> StoreSettings:
    return StoreSettings.model_validate(
        {"redis_url": valkey.url, "objects_url": f"file://{tmp_path}/objects", "redis_timeout_seconds": 5}
    )


@pytest.fixture
async def store(store_settings: StoreSettings) -> AsyncIterator[CartridgeStore]:
    opened = await CartridgeStore.open(store_settings)
    yield opened
    await opened.close()
