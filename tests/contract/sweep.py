"""A collection as tests make it."""

from __future__ import annotations

from foundry.store import CartridgeStore, Collected


async def gc(store: CartridgeStore, **values: object) -> list[Collected]:
    """What a collection takes; a dry run before it must say the same and change nothing."""
    announced = [collected async for collected in store.gc(dry_run=True, **values)]  # type: ignore[arg-type]
    again = [collected async for collected in store.gc(dry_run=True, **values)]  # type: ignore[arg-type]
    assert announced == again
    collected = [each async for each in store.gc(**values)]  # type: ignore[arg-type]
    assert announced == collected
    assert [each async for each in store.gc(dry_run=True, **values)] == []  # type: ignore[arg-type]
    return collected


def keys(collected: list[Collected], kind: str) -> list[str]:
    return [each.key for each in collected if each.kind == kind]
