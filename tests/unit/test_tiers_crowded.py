"""Tiers when everything happens at once: budgets hold at every moment, what is used stays, nothing is lost."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter

import pytest

from foundry.errors import CartridgeNotFound, FoundryError, ResourceExhausted
from foundry.identity import CartridgeBytes
from foundry.model.cartridge import Cartridge
from services.rollout.residency import Residency
from tests.unit.test_residency import ONE, SPEC, DictSource, P, RecordingEngine, named, stored


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


class Crowd:
    """Clients that use cartridges and give up at random; they check that what they use stays as it is."""

    def __init__(self, seed: int, host_slots: int) -> None:
        self._draw = random.Random(1000 + seed)
        self.cartridges = [stored(200 + index, num_tokens=P * (1 + index % 3)) for index in range(8)]
        self._meter = Meter(6 * ONE, host_slots * ONE)
        self.engine = MeteredEngine(self._meter)
        self.residency = self._meter.residency = Residency(
            SPEC,
            MeteredSource(self._meter, self._draw, *self.cartridges),
            self.engine,
            budget_bytes=self._meter.device_budget,
            host_budget_bytes=self._meter.host_budget,
            element_bytes=4,
        )
        # How the clients' tasks ended, by the type of their result.
        self.outcomes: Counter[str] = Counter()

    async def come_and_go(self) -> None:
        await asyncio.gather(*(self._client() for _ in range(6)))
        while self.residency._loads:
            await asyncio.gather(*self.residency._loads.values(), return_exceptions=True)

    async def _client(self) -> None:
        draw = self._draw
        for _ in range(12):
            task = asyncio.create_task(self._use())
            if draw.random() < 0.2:
                for _ in range(draw.randrange(12)):
                    await asyncio.sleep(0)
                task.cancel()
            (result,) = await asyncio.gather(task, return_exceptions=True)
            if isinstance(result, Exception) and not isinstance(result, FoundryError):
                raise result
            self.outcomes[type(result).__name__] += 1

    async def _use(self) -> None:
        draw, in_use = self._draw, self._meter.in_use
        wanted = [(each, draw.randint(1, 3)) for each in draw.sample(self.cartridges, draw.randint(1, 2))]
        hold = await self.residency.hold([(named(each), count) for each, count in wanted])
        for each, _ in wanted:
            in_use[each.digest()] += 1
        try:
            for _ in range(draw.randrange(30)):
                for each, _ in wanted:
                    assert self.engine.loaded[each.digest()].to_bytes().digest() == each.digest()
                await asyncio.sleep(0)
        finally:
            for each, _ in wanted:
                in_use[each.digest()] -= 1
            hold.release()


@pytest.fixture(params=[0, 2, 6], ids="host_slots={}".format)
def host_slots(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=range(8), ids="seed={}".format)
def crowd(request: pytest.FixtureRequest, host_slots: int) -> Crowd:
    return Crowd(request.param, host_slots)


async def test_budgets_hold_and_what_is_used_stays(crowd: Crowd) -> None:
    # It checks both at every moment.
    await crowd.come_and_go()
    assert {"NoneType", "CancelledError", "ResourceExhausted"} <= set(crowd.outcomes), crowd.outcomes


async def test_nothing_is_left_behind(crowd: Crowd) -> None:
    await crowd.come_and_go()
    residents = crowd.residency.device.residents()
    assert {each.digest for each in residents} == set(crowd.engine.loaded)
    assert [each.references for each in residents] == [0] * len(residents)
    assert crowd.residency.device._loading_bytes == crowd.residency.host._moving_bytes == 0


async def test_all_of_the_budget_can_be_used_again(crowd: Crowd) -> None:
    await crowd.come_and_go()
    wanted = crowd.cartridges[:3]
    assert sum(each.header.num_bytes for each in wanted) == 6 * ONE
    holds = (crowd.residency.hold([(named(each), 1)]) for each in wanted)
    results = await asyncio.gather(*holds, return_exceptions=True)
    # The source fails at times; the room never does.
    assert not [result for result in results if isinstance(result, ResourceExhausted)]
    assert crowd.residency.device._loading_bytes == crowd.residency.host._moving_bytes == 0
