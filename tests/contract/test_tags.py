"""Tags with history: promote and roll back, races, and what is left of them after Redis was lost."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from foundry.errors import CartridgeNotFound, Conflict, InvalidArgument, StoreUnavailable
from foundry.store import CartridgeStore, Manifest, Reference, StoreSettings
from foundry.store.redis.scripts import MAX_TAG_HISTORY
from tests.store_data import cartridge, draft
from tests.valkey import Valkey

pytestmark = pytest.mark.storages("file", "s3")
NUM_VERSIONS = 5


@pytest.fixture
async def report(store: CartridgeStore) -> CartridgeStore:
    """A store with five durable versions of `report` that nobody holds."""
    await store.acquire("report", "run-a", 1)
    for step in range(NUM_VERSIONS):
        await publish(store, step)
    await store.release("report", "run-a", 1)
    return store


async def publish(store: CartridgeStore, step: int) -> Manifest:
    parent = cartridge(step - 1).digest() if step else None
    values: dict[str, Any] = {
        "document": "blake3:" + "cd" * 32,
        "objective": "forward_kl",
        "tokens_seen": step,
        "metrics": {"kl": 0.5},
    }
    return await store.publish(cartridge(step), draft(step=step, parent=parent, **values), durable=True)


async def test_a_tag_goes_back_step_by_step(report: CartridgeStore) -> None:
    assert await report.tag("report", "prod", 1) is None
    assert await report.tag("report", "prod", 3) == 1
    assert await report.tag("report", "prod", 3) == 3, "not a move"
    assert await report.tag("report", "prod", 2) == 3
    assert (await report.tag_record("report", "prod")).history == (3, 1)
    assert await report.rollback_tag("report", "prod") == (3, 2)
    assert (await report.resolve("report@prod")).version == 3
    assert await report.rollback_tag("report", "prod") == (1, 3)
    with pytest.raises(Conflict, match="version 1 is the first"):
        await report.rollback_tag("report", "prod")
    assert await report.tags("report") == {"prod": 1}
    # What it was rolled back from is not in its past.
    assert await report.tag("report", "prod", 5) == 1
    assert (await report.tag_record("report", "prod")).history == (1,)


async def test_what_cannot_be_rolled_back(report: CartridgeStore) -> None:
    for name, tag in (("report", "prod"), ("other", "prod")):
        with pytest.raises(CartridgeNotFound):
            await report.rollback_tag(name, tag)
        with pytest.raises(CartridgeNotFound):
            await report.tag_record(name, tag)
    with pytest.raises(InvalidArgument):
        await report.rollback_tag("report", "latest")
    await report.tag("report", "prod", 1)
    await report.tag("report", "prod", 2)
    await report.untag("report", "prod")
    await report.tag("report", "prod", 3)
    with pytest.raises(Conflict):
        await report.rollback_tag("report", "prod")


async def test_versions_deleted_meanwhile_are_passed_over(report: CartridgeStore) -> None:
    for version in (1, 2, 3):
        await report.tag("report", "prod", version)
    await report.delete("report", 2)
    assert await report.rollback_tag("report", "prod") == (1, 3)


async def test_history_is_bounded(report: CartridgeStore) -> None:
    moves = [1 + number % 2 for number in range(MAX_TAG_HISTORY + 5)]
    for version in moves:
        await report.tag("report", "prod", version)
    history = (await report.tag_record("report", "prod")).history
    assert history == tuple(reversed(moves[4:-1]))
    assert len(history) == MAX_TAG_HISTORY


async def test_history_is_in_object_storage_and_survives_redis(report: CartridgeStore, valkey: Valkey) -> None:
    for version in (1, 2, 3):
        await report.tag("report", "prod", version)
    stored = json.loads(bytes(await report.objects.get("cartridges/report/tags/prod.json")))
    assert (stored["version"], stored["history"]) == (3, [2, 1])
    await report._connection.redis.flushall()
    assert await report.rollback_tag("report", "prod") == (2, 3)
    record = await report.tag_record("report", "prod")
    assert (record.version, record.history) == (2, (1,))
    valkey.kill()
    assert await report.tag_record("report", "prod") == record
    with pytest.raises(StoreUnavailable):
        await report.rollback_tag("report", "prod")


async def test_an_unreadable_tag_takes_nothing_with_it_and_is_written_anew(report: CartridgeStore) -> None:
    await report.tag("report", "prod", 1)
    await report.tag("report", "good", 2)
    await report.objects.put("cartridges/report/tags/prod.json", [b"{"])
    await report._connection.redis.flushall()
    assert await report.tags("report") == {"good": 2}
    await report.tag("report", "prod", 3)
    assert await report._durable.tags("report") == {"good": 2, "prod": 3}


async def test_racing_moves_end_the_same_in_redis_and_storage(
    report: CartridgeStore, store_settings: StoreSettings
) -> None:
    others = [await CartridgeStore.open(store_settings) for _ in range(4)]
    try:
        moves = [other.tag("report", "prod", 1 + number % NUM_VERSIONS) for number, other in enumerate(others * 5)]
        before = await asyncio.gather(*moves)
        record, _ = await report._durable.tag("report", "prod")
        assert record is not None
        assert record == await report.tag_record("report", "prod")
        # Each move saw the one before it: none is lost and none is there twice.
        changes = [1 + number % NUM_VERSIONS for number in range(20)]
        moved = [change for change, seen in zip(changes, before, strict=True) if change != seen]
        assert sorted([record.version, *record.history]) == sorted(moved)
    finally:
        for other in others:
            await other.close()


async def test_a_late_writer_does_not_bring_an_older_move_back(
    report: CartridgeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies right after its write, so that nothing but the condition of the write can help."""
    put_tag = report._durable.put_tag
    overtaken, writing = asyncio.Event(), asyncio.Event()

    class Died(BaseException):
        pass

    async def late(*args: object) -> bool:
        monkeypatch.undo()
        writing.set()
        await overtaken.wait()
        await put_tag(*args)  # type: ignore[arg-type]
        raise Died

    await report.tag("report", "prod", 1)
    monkeypatch.setattr(report._durable, "put_tag", late)
    older = asyncio.create_task(report.tag("report", "prod", 2))
    await writing.wait()
    await report.tag("report", "prod", 3)
    # Back to the very state that the late writer read, but for when it was reached.
    await report.rollback_tag("report", "prod")
    await report.rollback_tag("report", "prod")
    overtaken.set()
    with pytest.raises(Died):
        await older
    assert await report.tags("report") == {"prod": 1}
    assert await report._durable.tags("report") == {"prod": 1}


# latest


async def test_latest_goes_back_as_a_new_version(report: CartridgeStore) -> None:
    old, before = await report.manifest("report", 2), await report.manifest("report", 5)
    new = await report.rollback("report", Reference.parse("report@2"))
    assert await report.resolve("report") == new.id
    assert (new.version, new.digest, new.parent) == (6, old.digest, before.digest)
    assert new.init == "rollback of report@2"
    assert new.run.startswith("rollback-")
    for kept in ("document", "objective", "tokens_seen", "metrics", "step", "header"):
        assert getattr(new, kept) == getattr(old, kept)
    assert 6 in await report.durable_versions("report")
    assert (await report.fetch(new.digest)).digest() == old.digest
    # Nobody holds the name afterwards.
    await report.acquire("report", "run-b", 1)


async def test_latest_goes_back_to_a_tag_and_to_a_digest(report: CartridgeStore) -> None:
    await report.tag("report", "good", 3)
    assert (await report.rollback("report", Reference.parse("report@good"))).digest == cartridge(2).digest()
    by_digest = Reference.parse(f"report@{cartridge(0).digest()}")
    assert (await report.rollback("report", by_digest)).init == "rollback of report@1"


async def test_latest_does_not_go_back_under_a_run(report: CartridgeStore) -> None:
    await report.acquire("report", "run-b", 1)
    with pytest.raises(Conflict, match="run-b"):
        await report.rollback("report", Reference.parse("report@2"))
    assert (await report.resolve("report")).version == NUM_VERSIONS


async def test_a_rollback_that_changes_nothing_or_has_no_aim(report: CartridgeStore) -> None:
    with pytest.raises(Conflict, match="already"):
        await report.rollback("report", Reference.parse("report@5"))
    with pytest.raises(CartridgeNotFound):
        await report.rollback("report", Reference.parse("report@17"))
    with pytest.raises(InvalidArgument):
        await report.rollback("report", Reference.parse("other@1"))
    assert (await report.resolve("report")).version == NUM_VERSIONS
    await report.acquire("report", "run-b", 1)


async def test_a_process_that_dies_in_a_rollback_does_not_keep_the_name(
    report: CartridgeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dies(*_: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(report, "publish", dies)
    monkeypatch.setattr(report, "release", dies)
    with pytest.raises(asyncio.CancelledError):
        await report.rollback("report", Reference.parse("report@2"))
    monkeypatch.undo()
    with pytest.raises(Conflict, match="rollback-"):
        await report.acquire("report", "run-b", 1)
    # Its time is over.
    await report._connection.redis.hset("foundry:name:report", "held_until", "1")
    await report.acquire("report", "run-b", 1)
    await report.publish(cartridge(99), draft(run="run-b", step=9), durable=True)
