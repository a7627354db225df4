"""Whose runs are: who sees them, and how many may be open."""

from __future__ import annotations

import pytest

from foundry.errors import (
    DigestMismatch,
    InvalidArgument,
    ResourceExhausted,
    RunNotFound,
)
from foundry.store import CartridgeStore, RunState, RunStore
from tests.store_data import claim, run_spec
from tests.valkey import Valkey


@pytest.fixture
async def of_tenants(runs: RunStore) -> dict[str, list[str]]:
    """Two runs of each tenant, newest first; each takes its turn."""
    created: dict[str, list[str]] = {"": [], "acme": [], "acm": []}
    for _ in range(2):
        for tenant, run_ids in created.items():
            run_ids.insert(0, await runs.create(run_spec(f"{tenant or 'acme'}/report"), tenant=tenant))
    return created


async def test_a_tenant_sees_its_own_runs(store: CartridgeStore, of_tenants: dict[str, list[str]]) -> None:
    runs = store.runs
    assert {run.run_id for run in await runs.list()} == {run_id for each in of_tenants.values() for run_id in each}
    for _ in range(2):
        for tenant, (newest, oldest) in of_tenants.items():
            assert [(run.run_id, run.tenant) for run in await runs.list(tenant=tenant)] == [
                (newest, tenant),
                (oldest, tenant),
            ]
            page = await runs.page(limit=1, tenant=tenant)
            assert ([run.run_id for run in page.items], page.next_after) == ([newest], newest)
            page = await runs.page(after=newest, limit=1, tenant=tenant)
            assert ([run.run_id for run in page.items], page.next_after) == ([oldest], None)
        # And when Redis was lost.
        await store._connection.redis.flushall()


async def test_the_run_of_another_tenant_is_as_one_that_is_not_there(
    runs: RunStore, of_tenants: dict[str, list[str]]
) -> None:
    run_id = of_tenants["acme"][0]
    assert (await runs.get(run_id, tenant="acme")).tenant == "acme"
    for tenant in ("", "acm"):
        with pytest.raises(RunNotFound, match=f"^there is no run {run_id}$"):
            await runs.get(run_id, tenant=tenant)
        with pytest.raises(InvalidArgument) as refused:
            await runs.page(after=run_id, limit=1, tenant=tenant)
        assert refused.value.message == f"{run_id!r} is not in the list, or not any more: begin it again"


async def test_without_redis_a_tenant_sees_its_own_runs(
    runs: RunStore, of_tenants: dict[str, list[str]], valkey: Valkey
) -> None:
    valkey.kill()
    for tenant, run_ids in of_tenants.items():
        assert [run.run_id for run in await runs.list(tenant=tenant)] == run_ids


async def test_a_worker_learns_whose_a_run_is(store: CartridgeStore, of_tenants: dict[str, list[str]]) -> None:
    (one, two), other = of_tenants["acme"], of_tenants[""][0]
    for run_id, tenant in ((one, "acme"), (other, "")):
        claimed = await store.runs.claim_run(run_id, "worker-0", 60)
        assert claimed is not None
        assert claimed.tenant == tenant
    await store._connection.redis.flushall()
    claimed = await store.runs.claim_run(two, "worker-0", 60)
    assert claimed is not None
    assert claimed.tenant == "acme"


@pytest.mark.parametrize(("name", "tenant"), [("report", "acme"), ("acm/report", "acme"), ("acme/report", "ACME")])
async def test_a_run_of_a_tenant_publishes_under_its_names(runs: RunStore, name: str, tenant: str) -> None:
    with pytest.raises(InvalidArgument):
        await runs.create(run_spec(name), tenant=tenant)
    assert await runs.list() == []


async def test_a_run_whose_tenant_does_not_fit_is_damaged(store: CartridgeStore) -> None:
    run_id = await store.runs.create(run_spec("acme/report"), tenant="acme")
    await store._connection.redis.hset(f"foundry:run:{run_id}", "tenant", "acm")
    with pytest.raises(DigestMismatch, match=run_id):
        await store.runs.get(run_id)
    assert await store.runs.claim("worker-0", 60) is None
    await store.rebuild(force=True)
    assert (await store.runs.get(run_id)).tenant == "acme"


async def test_runs_of_a_tenant_that_are_not_over_are_limited(store: CartridgeStore) -> None:
    runs = store.runs

    async def create() -> str:
        return await runs.create(run_spec(), most_open=3)

    run_ids = [await create() for _ in range(3)]
    await runs.request_pause(run_ids[0])
    held = await claim(runs)
    await store._connection.redis.flushall()
    for making in (create(), runs.check_open("", 3)):
        with pytest.raises(ResourceExhausted, match="3 runs are not over"):
            await making
    # What was refused is nowhere.
    assert len(await runs._archive.runs()) == 3
    await runs.create(run_spec("acme/report"), tenant="acme", most_open=1)
    await runs.finish(held.run_id, held.attempt, RunState.FAILED, error="no luck")
    await runs.request_cancel(run_ids[0])
    await runs.check_open("", 2)
    await create()
    await create()
    with pytest.raises(ResourceExhausted):
        await create()
    # Who has no limit may make more, which count.
    await runs.create(run_spec())
    with pytest.raises(ResourceExhausted, match="4 runs are not over"):
        await runs.check_open("", 4)
