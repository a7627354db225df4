"""Tiers under any order of events: budgets hold at every moment, what is used stays, the oldest goes first."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter, OrderedDict

import pytest

from foundry.cartridge import Cartridge
from foundry.errors import CartridgeNotFound, Conflict, DigestMismatch, FoundryError, ResourceExhausted
from foundry.identity import CartridgeBytes, CartridgeHeader
from services.rollout.residency import Residency
from tests.unit.test_residency import ONE, SPEC, DictSource, P, RecordingEngine, make, named, stored

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


async def test_pinned_ones_stay_until_they_are_unloaded() -> None:
    residency, engine = make(DictSource(A, B, C, D), host_budget_bytes=4 * ONE)
    await residency.load(named(A), pin=True)
    await residency.load(named(B))
    # An ordinary load does not unpin.
    await residency.load(named(A))
    await residency.load(named(C))
    await residency.load(named(D))
    assert set(engine.loaded) == {A.digest(), D.digest()}
    hold = await residency.hold([(named(D), 2)])
    with pytest.raises(ResourceExhausted) as caught:
        await residency.load(named(B))
    assert f"of {2 * ONE} bytes {ONE} are in use, {ONE} more are pinned and 0 are of" in caught.value.message
    assert caught.value.retry_after_seconds is not None
    residency.unload(A.digest())
    residency.unload(A.digest())
    assert A.digest() not in in_host(residency)
    await residency.load(named(B))
    assert set(engine.loaded) == {B.digest(), D.digest()}
    hold.release()


async def test_a_pin_while_it_is_loaded_for_somebody_else() -> None:
    source = DictSource(A, B, C)
    source.fetch_gate.clear()
    residency, engine = make(source)
    plain = asyncio.create_task(residency.load(named(A)))
    pinning = asyncio.create_task(residency.load(named(A), pin=True))
    given_up = asyncio.create_task(residency.load(named(B), pin=True))
    await source.asked.wait()
    given_up.cancel()
    source.fetch_gate.set()
    await asyncio.gather(plain, pinning)
    await residency.load(named(B))
    await residency.load(named(C))
    # The one who gave up pinned nothing.
    assert set(engine.loaded) == {A.digest(), C.digest()}


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
    device: OrderedDict[str, bool] = OrderedDict()
    host: OrderedDict[str, None] = OrderedDict()
    fetched: list[str] = []
    draw = random.Random(seed)
    for _ in range(60):
        cartridge = draw.choice(cartridges)
        digest = cartridge.digest()
        if draw.random() < 0.1:
            residency.unload(digest)
            device.pop(digest, None)
            host.pop(digest, None)
        else:
            pin = draw.random() < 0.1
            evictable = [key for key, pinned in device.items() if not pinned]
            if digest not in device and len(device) == device_slots and not evictable:
                with pytest.raises(ResourceExhausted):
                    await residency.load(named(cartridge), pin=pin)
            else:
                await residency.load(named(cartridge), pin=pin)
                if digest not in device:
                    if len(device) == device_slots:
                        del device[evictable[0]]
                    if digest not in host:
                        fetched.append(digest)
                        if host_slots:
                            while len(host) >= host_slots:
                                host.popitem(last=False)
                            host[digest] = None
                    device[digest] = False
                device[digest] |= pin
                device.move_to_end(digest)
                if digest in host:
                    host.move_to_end(digest)
        assert on_device(residency) == list(device)
        assert set(engine.loaded) == set(device)
        assert in_host(residency) == list(host)
        assert source.fetched == fetched


class Meter:
    """Counts the bytes of each tier at the moments when they grow."""

    def __init__(self, device_budget: int, host_budget: int) -> None:
        self.device_budget, self.host_budget = device_budget, host_budget
        self.residency: Residency | None = None
        self.coming: Counter[str] = Counter()
        self.in_use: Counter[str] = Counter()

    def check_host(self, sizes: dict[str, int]) -> None:
        assert self.residency is not None
        kept = sum(each.num_bytes for each in self.residency.host.entries())
        coming = sum(sizes[digest] * count for digest, count in self.coming.items())
        alone = max(sizes.values()) if sum(self.coming.values()) == 1 and not kept else 0
        assert kept + coming <= max(self.host_budget, alone)


class MeteredSource(DictSource):
    """Takes a random number of turns of the loop for each call; some fail."""

    def __init__(self, meter: Meter, draw: random.Random, *cartridges: CartridgeBytes) -> None:
        super().__init__(*cartridges)
        self.meter, self.draw = meter, draw
        self.sizes = {digest: cartridge.header.num_bytes for digest, cartridge in self.cartridges.items()}

    async def fetch(self, digest: str) -> CartridgeBytes:
        self.meter.coming[digest] += 1
        try:
            for _ in range(self.draw.randrange(6)):
                self.meter.check_host(self.sizes)
                await asyncio.sleep(0)
            if self.draw.random() < 0.1:
                raise CartridgeNotFound("swept")
            return await super().fetch(digest)
        finally:
            self.meter.coming[digest] -= 1


class MeteredEngine(RecordingEngine):
    """Called from threads (load) and from the loop (unload)."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter
        self._lock = threading.Lock()

    def load(self, digest: str, cartridge: Cartridge) -> None:
        with self._lock:
            super().load(digest, cartridge)
            assert sum(each.header.num_bytes for each in self.loaded.values()) <= self._meter.device_budget

    def unload(self, digest: str) -> None:
        assert not self._meter.in_use[digest]
        with self._lock:
            super().unload(digest)


@pytest.mark.parametrize("host_slots", [0, 2, 6])
@pytest.mark.parametrize("seed", range(8))
async def test_nothing_is_exceeded_or_lost_when_everything_happens_at_once(seed: int, host_slots: int) -> None:
    draw = random.Random(1000 + seed)
    cartridges = [stored(200 + index, num_tokens=P * (1 + index % 3)) for index in range(8)]
    meter = Meter(6 * ONE, host_slots * ONE)
    source, engine = MeteredSource(meter, draw, *cartridges), MeteredEngine(meter)
    residency = meter.residency = Residency(
        SPEC,
        source,
        engine,
        budget_bytes=meter.device_budget,
        host_budget_bytes=meter.host_budget,
        element_bytes=4,
    )
    outcomes: Counter[str] = Counter()

    async def use() -> None:
        wanted = [(each, draw.randint(1, 3)) for each in draw.sample(cartridges, draw.randint(1, 2))]
        hold = await residency.hold([(named(each), count) for each, count in wanted])
        for each, _ in wanted:
            meter.in_use[each.digest()] += 1
        try:
            for _ in range(draw.randrange(30)):
                for each, _ in wanted:
                    assert engine.loaded[each.digest()].to_bytes().digest() == each.digest()
                await asyncio.sleep(0)
        finally:
            for each, _ in wanted:
                meter.in_use[each.digest()] -= 1
            hold.release()

    async def pin_for_a_while() -> None:
        cartridge = draw.choice(cartridges[:2])
        await residency.load(named(cartridge), pin=True)
        meter.in_use[cartridge.digest()] += 1
        for _ in range(draw.randrange(30)):
            assert cartridge.digest() in engine.loaded
            await asyncio.sleep(0)
        meter.in_use[cartridge.digest()] -= 1
        try:
            residency.unload(cartridge.digest())
        except Conflict:
            # Somebody decodes with it, so it would stay anyway.
            residency.device.use(cartridge.digest()).pinned = False

    async def client(number: int) -> None:
        for _ in range(12):
            # Two pins of one digest would unpin each other: one client pins.
            task = asyncio.create_task(pin_for_a_while() if number == 0 else use())
            if draw.random() < 0.2 and number:
                for _ in range(draw.randrange(12)):
                    await asyncio.sleep(0)
                task.cancel()
            (result,) = await asyncio.gather(task, return_exceptions=True)
            if isinstance(result, Exception) and not isinstance(result, FoundryError):
                raise result
            outcomes[type(result).__name__] += 1

    await asyncio.gather(*(client(number) for number in range(6)))
    while residency._loads:
        await asyncio.gather(*residency._loads.values(), return_exceptions=True)
    assert [each.references for each in residency.device.residents()] == [0] * len(engine.loaded)
    assert set(on_device(residency)) == set(engine.loaded)
    assert residency.device._loading_bytes == residency.host._moving_bytes == 0
    # All of it happened.
    assert {"NoneType", "CancelledError", "ResourceExhausted"} <= set(outcomes), outcomes
    # And all fits again: nothing was leaked.
    await asyncio.gather(*(residency.hold([(named(each), 1)]) for each in cartridges[:3]), return_exceptions=True)
    assert residency.device._loading_bytes == residency.host._moving_bytes == 0
