"""Redis lost again while somebody restores it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from foundry.errors import Fenced, StoreUnavailable
from foundry.store import CartridgeStore, StoreSettings, TagRecord
from foundry.store.redis.connection import Reply
from tests.contract.redis_loss.versions import flush, publish
from tests.store_data import cartridge, draft, run_spec
from tests.valkey import Valkey

pytestmark = pytest.mark.storages("file", "s3")


class EmptiedBefore:
    """Redis is emptied just before the steps of a rebuild that `emptied` says, the first being 0."""

    def __init__(self, store: CartridgeStore, monkeypatch: pytest.MonkeyPatch, emptied: Callable[[int], bool]) -> None:
        self.num_steps = 0
        self._store, self._emptied, self._step = store, emptied, store._connection.run_restoring
        monkeypatch.setattr(store._connection, "run_restoring", self._run)

    async def _run(self, script: str, *args: str | int) -> Reply:
        if self._emptied(self.num_steps):
            await flush(self._store)
        self.num_steps += 1
        return await self._step(script, *args)


async def test_redis_may_be_emptied_between_any_two_steps(
    filled: CartridgeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled.runs.create(run_spec("notes"))
    # Two names: what one step restored is gone when the next one comes.
    await filled.acquire("zoo", "run-a", 1)
    animal = await filled.publish(cartridge(9), draft("zoo"), durable=True)
    durable = [await filled.manifest("report", version) for version in (1, 2, 4)]
    newest = max(manifest.version for manifest in await filled.versions("report"))
    await flush(filled)
    with monkeypatch.context() as patch:
        counted = EmptiedBefore(filled, patch, lambda step: False)
        await filled.rebuild()
    for place in range(counted.num_steps):
        await flush(filled)
        with monkeypatch.context() as patch:
            steps = EmptiedBefore(filled, patch, place.__eq__)
            await filled.rebuild()
        assert steps.num_steps > place
        assert await filled.versions("report") == durable, place
        assert await filled.resolve("report@best") == durable[0].id, place
        assert await filled.resolve("zoo") == animal.id, place
        assert len(await filled.runs.list()) == 1, place
        await filled.acquire("report", f"run-{place}", 1)
        after = await filled.publish(cartridge(99), draft(run=f"run-{place}", step=place), durable=False)
        assert after.version > newest, f"a number was given out twice, emptied before step {place}"
        newest = after.version


async def test_a_redis_that_is_emptied_over_and_over_is_not_restored_for_ever(
    filled: CartridgeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        EmptiedBefore(filled, patch, lambda step: True)
        await flush(filled)
        with pytest.raises(StoreUnavailable, match="emptied again and again"):
            await filled.rebuild()
    assert (await filled.resolve("report")).version == 4


@pytest.mark.parametrize("loss", ["restarted", "emptied"])
async def test_what_was_read_for_one_redis_is_not_written_to_the_next(
    store: CartridgeStore, store_settings: StoreSettings, valkey: Valkey, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """A process is slow to restore; meanwhile others restored, published beyond the limit, and Redis is lost again."""

    async def lose() -> None:
        await (valkey.restart() if loss == "restarted" else flush(store))

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
    await lose()
    resolving = asyncio.create_task(slow.resolve("report"))
    await has_read.wait()
    await store.acquire("report", "run-a", 1)
    newest = await publish(store, 1, durable=True)
    await lose()
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
