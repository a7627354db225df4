"""Redis lost again while somebody restores it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from foundry.errors import Fenced
from foundry.store import CartridgeStore, StoreSettings, TagRecord
from tests.contract.redis_loss.versions import flush, publish
from tests.store_data import run_spec
from tests.valkey import Valkey

pytestmark = pytest.mark.storages("file", "s3")


async def test_what_was_read_for_one_redis_is_not_written_to_the_next(
    store: CartridgeStore, store_settings: StoreSettings, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process is slow to restore; meanwhile others restored, published beyond the limit, and Redis is lost again."""
    await store.acquire("report", "run-a", 1)
    await publish(store, 0, durable=True)
    slow = await CartridgeStore.open(store_settings)
    has_read, go_on = asyncio.Event(), asyncio.Event()
    read_tags = slow._durable.tag_records

    async def read_slowly(name: str) -> dict[str, TagRecord]:
        tags = await read_tags(name)
        has_read.set()
        await go_on.wait()
        return tags

    monkeypatch.setattr(slow._durable, "tag_records", read_slowly)
    await valkey.restart()
    resolving = asyncio.create_task(slow.resolve("report"))
    await has_read.wait()
    await store.acquire("report", "run-a", 1)
    newest = await publish(store, 1, durable=True)
    await valkey.restart()
    go_on.set()
    assert await resolving == newest.id
    await slow.acquire("report", "run-a", 2)
    assert (await publish(slow, 2, attempt=2)).version > newest.version
    await slow.close()


async def test_an_attempt_that_redis_forgot_is_not_given_out_again(
    store: CartridgeStore, store_settings: StoreSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = await store.runs.create(run_spec())
    begin_attempt = store.runs._archive.begin_attempt

    async def begin_after_a_loss(*args: Any) -> bool:
        await flush(store)
        await store.rebuild()
        return await begin_attempt(*args)

    monkeypatch.setattr(store.runs._archive, "begin_attempt", begin_after_a_loss)
    first = await store.runs.claim("worker-0", 60)
    other = await CartridgeStore.open(store_settings)
    second = await other.runs.claim("worker-1", 60)
    assert first is not None
    assert second is not None
    assert (first.attempt, second.attempt) == (1, 2)
    with pytest.raises(Fenced):
        await store.runs.heartbeat(run_id, first.attempt, 60)
    await other.runs.heartbeat(run_id, second.attempt, 60)
    await other.close()
