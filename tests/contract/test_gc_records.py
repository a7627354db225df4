"""The collector and what stands beside cartridges: runs, documents and data sets beyond their days."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from foundry.errors import DigestMismatch, DocumentNotFound, RunNotFound
from foundry.identity import content_digest
from foundry.store import CartridgeStore, DatasetSummary, DocumentPrompts, RunState, StoreSettings
from foundry.store.objects import layout
from foundry.store.upkeep.gc_records import RecordCollector
from tests.contract.sweep import gc, keys
from tests.store_data import DOCUMENT, cartridge, claim, draft, run_spec
from tests.valkey import Valkey

GRACE_SECONDS = 3600
DATASET = "blake3:" + "ef" * 32


def settings(valkey: Valkey, directory: Path, **values: Any) -> StoreSettings:
    days = {"keep_runs_days": 1, "keep_documents_days": 1, "sweep_grace_seconds": GRACE_SECONDS}
    places = {"redis_url": valkey.url, "objects_url": f"file://{directory}/objects"}
    return StoreSettings.model_validate(places | days | values)


@pytest.fixture
async def keeping(valkey: Valkey, tmp_path: Path) -> AsyncIterator[CartridgeStore]:
    """A store that keeps runs and documents for a day."""
    opened = await CartridgeStore.open(settings(valkey, tmp_path))
    yield opened
    await opened.close()


def age(directory: Path, *places: str, days: float = 2) -> None:
    """All that lies below was written so long ago; without places, all there is."""
    then = time.time() - days * 86400
    for place in places or ("",):
        below = directory / "objects" / place
        for path in below.rglob("*") if below.is_dir() else [below]:
            os.utime(path, (then, then))


async def ended(store: CartridgeStore, name: str = "report", tenant: str = "", **spec: Any) -> str:
    run_id = await store.runs.create(run_spec(name, **spec), tenant=tenant)
    claimed = await claim(store.runs)
    await store.runs.save_checkpoint(run_id, claimed.attempt, 1, [b"state"])
    await store.runs.finish(run_id, claimed.attempt, RunState.SUCCEEDED)
    return run_id


async def write_dataset(store: CartridgeStore, tenant: str) -> None:
    await store.datasets.of(tenant).append(DATASET, "cloze", 0, [{"family": "cloze"}])
    await store.datasets.of(tenant).finish(DATASET, DatasetSummary(digest=DATASET, families={}))


async def test_runs_go_when_they_ended_long_enough_ago(keeping: CartridgeStore, tmp_path: Path) -> None:
    old, young = await ended(keeping, "acme/report", "acme"), await ended(keeping)
    going_on = await keeping.runs.create(run_spec("notes"))
    age(tmp_path, f"runs/{old}", f"runs/{going_on}")
    redis: Any = keeping._connection.redis
    collected = await gc(keeping)
    assert [(each.kind, each.key) for each in collected] == [("run", f"runs/{old}")]
    assert collected[0].num_bytes > 0
    for _ in range(2):
        assert {run.run_id for run in await keeping.runs.list()} == {young, going_on}
        with pytest.raises(RunNotFound):
            await keeping.runs.get(old)
        assert await keeping.runs.list(tenant="acme") == []
        assert await redis.exists(f"foundry:run-events:{old}") == 0
        # A fence, which expires.
        assert await redis.ttl(f"foundry:run:{old}") != -1
        assert await keeping.objects.keys(f"runs/{old}") == []
        assert await keeping.runs.load_checkpoint(young) is not None
        await redis.flushall()


async def test_everything_is_kept_without_a_limit(valkey: Valkey, tmp_path: Path) -> None:
    store = await CartridgeStore.open(settings(valkey, tmp_path, keep_runs_days=None, keep_documents_days=None))
    run_id = await ended(store)
    await store.documents.put("text")
    await write_dataset(store, "")
    age(tmp_path)
    assert {each.kind for each in await gc(store)} == {"checkpoint"}
    assert [run.run_id for run in await store.runs.list()] == [run_id]
    await store.close()


@pytest.mark.parametrize("hours_old", [0.5, 2])
async def test_what_a_deletion_left_goes_after_the_grace(
    keeping: CartridgeStore, tmp_path: Path, hours_old: float
) -> None:
    left, refused = await ended(keeping), await keeping.runs.create(run_spec("notes"))
    await keeping.runs._archive.forget(left)
    await keeping._connection.run("runs/delete", left)
    # One that Redis has all the same: the answer to its maker was lost.
    claimed = await claim(keeping.runs)
    await keeping.runs.save_checkpoint(refused, claimed.attempt, 1, [b"state"])
    await keeping.runs._archive.forget(refused)
    await keeping.objects.put("runs/notes/readme.txt", [b"not ours"])
    age(tmp_path, "runs", days=hours_old / 24)
    collected = await gc(keeping)
    assert [(each.kind, each.key) for each in collected] == [("run", f"runs/{left}")] * (hours_old > 1)
    assert await keeping.runs.load_checkpoint(refused) is not None
    assert await keeping.objects.exists("runs/notes/readme.txt")


async def test_documents_that_nothing_names_go(keeping: CartridgeStore, tmp_path: Path) -> None:
    """Of each tenant, whatever names the same text of another."""
    texts = ("of a run", "of a second", "of prompts", "of a start", "of a manifest", "of nothing", "put again")
    digests = {text: content_digest(text.encode()) for text in texts}
    for tenant in ("", "acme", "acm"):
        for text in texts:
            await keeping.documents.of(tenant).put(text)
    spec: dict[str, Any] = {
        "document": digests["of a run"],
        "more_documents": (digests["of a second"],),
        "prompts": DocumentPrompts(digest=digests["of prompts"]),
        "init": "text",
        "init_text": digests["of a start"],
    }
    await keeping.runs.create(run_spec("acme/report", **spec), tenant="acme")
    await keeping.acquire("acme/notes", "import-a", 1)
    named = draft("acme/notes", run="import-a", document=digests["of a manifest"])
    await keeping.publish(cartridge(0), named, durable=True)
    age(tmp_path)
    await keeping.documents.put("put again")

    await gc(keeping)

    async def left(tenant: str) -> set[str]:
        return {info.digest for info in await keeping.documents.of(tenant).list()}

    # The name may be of a run without a tenant.
    assert await left("") == {digests["put again"], digests["of a manifest"]}
    assert await left("acme") == set(digests.values()) - {digests["of nothing"], digests["put again"]}
    assert await left("acm") == set()
    assert await keeping.objects.keys("documents/acm") == []
    with pytest.raises(DocumentNotFound):
        await keeping.documents.get(digests["of nothing"])


async def test_a_document_goes_with_the_last_run_that_names_it(keeping: CartridgeStore, tmp_path: Path) -> None:
    digest = await keeping.documents.put("text")
    run_id = await ended(keeping, document=digest)
    age(tmp_path, "documents")
    assert keys(await gc(keeping), "document") == []
    age(tmp_path, f"runs/{run_id}")
    assert keys(await gc(keeping), "document") == [layout.document("", digest)]


async def test_data_sets_go_once_all_runs_of_the_tenant_are_over(keeping: CartridgeStore, tmp_path: Path) -> None:
    for tenant in ("", "acme", "acm"):
        await write_dataset(keeping, tenant)
    await ended(keeping, "acm/report", "acm")
    await keeping.runs.create(run_spec("acme/report"), tenant="acme")
    age(tmp_path, "datasets/acme", "datasets/acm")
    assert keys(await gc(keeping), "dataset") == [layout.dataset("acm", DATASET)]
    assert await keeping.objects.keys("datasets/acm") == []
    await keeping.datasets.of("acme").summary(DATASET)
    await keeping.datasets.summary(DATASET)


async def test_a_document_of_a_run_that_begins_meanwhile_stays(
    keeping: CartridgeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, look = await keeping.documents.put("text"), RecordCollector._look_at_runs
    age(tmp_path)
    begun: list[str] = []

    async def and_a_new_run(collector: RecordCollector) -> None:
        await look(collector)
        if not begun:
            begun.append(await keeping.runs.create(run_spec(document=digest)))

    monkeypatch.setattr(RecordCollector, "_look_at_runs", and_a_new_run)
    assert [each async for each in keeping.gc()] == []
    assert await keeping.documents.get(digest) == "text"


async def test_no_document_goes_while_a_run_is_unreadable(keeping: CartridgeStore, tmp_path: Path) -> None:
    digest, run_id = await keeping.documents.put("text"), await keeping.runs.create(run_spec())
    await keeping.objects.put(f"runs/{run_id}/run.json", [b"{"])
    age(tmp_path)
    with pytest.raises(DigestMismatch, match=run_id):
        assert [each async for each in keeping.gc()] == []
    assert await keeping.documents.get(digest) == "text"


@pytest.mark.parametrize("hours_old", [0.5, 2])
async def test_the_grace_is_kept_where_the_limit_is_shorter(valkey: Valkey, tmp_path: Path, hours_old: float) -> None:
    store = await CartridgeStore.open(settings(valkey, tmp_path, keep_runs_days=1e-6, keep_documents_days=1e-6))
    await ended(store, document=DOCUMENT)
    await store.documents.put("text")
    age(tmp_path, days=hours_old / 24)
    assert {each.kind for each in await gc(store)} == ({"run", "document"} if hours_old > 1 else set())
    await store.close()
