"""Versions in a store, and the loss of what its Redis holds."""

from __future__ import annotations

from foundry.store import CartridgeStore, Manifest
from tests.store_data import cartridge, draft


async def publish(store: CartridgeStore, step: int, *, durable: bool = False, attempt: int = 1) -> Manifest:
    return await store.publish(cartridge(step), draft(step=step, attempt=attempt), durable=durable)


async def flush(store: CartridgeStore) -> None:
    await store._connection.redis.flushall()
