"""Tiers, one event after the other: what is kept where, and what goes first."""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict

import pytest

from foundry.errors import DigestMismatch, ResourceExhausted
from foundry.identity import CartridgeHeader
from services.rollout.residency import Residency
from tests.unit.test_residency import ONE, DictSource, P, make, named, stored

A, B, C, D = (stored(seed) for seed in range(4))
LARGE = stored(9, num_tokens=3 * P)


def on_device(residency: Residency) -> list[str]:
    return [resident.digest for resident in residency.device.residents()]


def in_host(residency: Residency) -> list[str]:
    return [kept.named.digest for kept in residency.host.entries()]


async def test_what_leaves_the_device_comes_back_without_the_store() -> None:
    source = DictSource(A, B)
    residency, engine = make(source, budget_bytes=ONE, host_budget_bytes=2 * ONE)
    for cartridge in (A, B, A, B):
        assert await residency.load(named(cartridge)) is False
        assert list(engine.loaded) == [cartridge.digest()]
        assert engine.loaded[cartridge.digest()].to_bytes().digest() == cartridge.digest()
    assert source.fetched == [A.digest(), B.digest()]
    # Also when the store is gone.
    source.cartridges.clear()
    assert await residency.load(named(A)) is False


async def test_without_a_host_budget_everything_comes_from_the_store() -> None:
    source = DictSource(A, B)
    residency, _ = make(source, budget_bytes=ONE, host_budget_bytes=0)
    for cartridge in (A, B, A):
        await residency.load(named(cartridge))
    assert source.fetched == [A.digest(), B.digest(), A.digest()]
    assert in_host(residency) == []


async def test_a_cartridge_larger_than_the_host_budget_passes_through() -> None:
    residency, engine = make(DictSource(LARGE), budget_bytes=3 * ONE, host_budget_bytes=ONE)
    await residency.load(named(LARGE))
    assert list(engine.loaded) == [LARGE.digest()]
    assert in_host(residency) == []


async def test_transfers_wait_for_host_memory() -> None:
    source = DictSource(A, B, C)
    source.fetch_gate.clear()
    residency, engine = make(source, budget_bytes=3 * ONE, host_budget_bytes=2 * ONE)
    loads = [asyncio.create_task(residency.load(named(each))) for each in (A, B, C)]
    for _ in range(50):
        await asyncio.sleep(0)
    # The third knows its size, and waits: two copies are all that the budget holds.
    assert source.looked_up == [A.digest(), B.digest(), C.digest()]
    assert source.fetched == [A.digest(), B.digest()]
    source.fetch_gate.set()
    await asyncio.gather(*loads)
    assert set(engine.loaded) == {A.digest(), B.digest(), C.digest()}
    assert len(in_host(residency)) == 2


async def test_a_failed_transfer_lets_the_next_one_go() -> None:
    source = DictSource(A, B)
    source.cartridges[A.digest()] = C
    source.cartridges[B.digest()] = B
    residency, engine = make(source)
    results = await asyncio.gather(residency.load(named(A)), residency.load(named(B)), return_exceptions=True)
    assert [type(result) for result in results] == [DigestMismatch, bool]
    assert list(engine.loaded) == [B.digest()]


async def test_a_header_that_the_bytes_deny_is_refused() -> None:
    class Boasting(DictSource):
        async def header(self, digest: str) -> CartridgeHeader:
            return LARGE.header

    residency, engine = make(Boasting(A), budget_bytes=3 * ONE, host_budget_bytes=3 * ONE)
    with pytest.raises(DigestMismatch, match="differs from its verified bytes"):
        await residency.load(named(A))
    assert not engine.loaded
    assert in_host(residency) == []


async def test_what_is_in_use_stays() -> None:
    residency, engine = make(DictSource(A, B, C, D))
    used = await residency.hold([(named(A), 1)])
    await residency.load(named(B))
    await residency.load(named(C))
    assert set(engine.loaded) == {A.digest(), C.digest()}
    more = await residency.hold([(named(C), 2)])
    with pytest.raises(ResourceExhausted) as caught:
        await residency.load(named(B))
    assert f"of {2 * ONE} bytes {2 * ONE} are in use and 0 are of" in caught.value.message
    assert caught.value.retry_after_seconds is not None
    used.release()
    await residency.load(named(B))
    assert set(engine.loaded) == {B.digest(), C.digest()}
    more.release()


async def test_a_prefetch_is_no_use_of_the_name() -> None:
    residency, _ = make(DictSource(A, B))
    await residency.prefetch(named(A))
    assert not residency.served_within("report", 60)
    await residency.load(named(B))
    assert residency.served_within("report", 60)
    assert not residency.served_within("other", 60)


@pytest.mark.parametrize("host_slots", [0, 1, 3, 8])
@pytest.mark.parametrize("seed", range(5))
async def test_order_is_least_recently_used_in_both_tiers(seed: int, host_slots: int) -> None:
    """Against a model of two lists; one thing happens at a time."""
    device_slots, cartridges = 3, [stored(100 + index) for index in range(7)]
    source = DictSource(*cartridges)
    residency, engine = make(source, budget_bytes=device_slots * ONE, host_budget_bytes=host_slots * ONE)
    device: OrderedDict[str, None] = OrderedDict()
    host: OrderedDict[str, None] = OrderedDict()
    fetched: list[str] = []
    draw = random.Random(seed)
    for _ in range(60):
        cartridge = draw.choice(cartridges)
        digest = cartridge.digest()
        await residency.load(named(cartridge))
        if digest not in device:
            if len(device) == device_slots:
                device.popitem(last=False)
            if digest not in host:
                fetched.append(digest)
                if host_slots:
                    while len(host) >= host_slots:
                        host.popitem(last=False)
                    host[digest] = None
            device[digest] = None
        device.move_to_end(digest)
        if digest in host:
            host.move_to_end(digest)
        assert on_device(residency) == list(device)
        assert set(engine.loaded) == set(device)
        assert in_host(residency) == list(host)
        assert source.fetched == fetched
