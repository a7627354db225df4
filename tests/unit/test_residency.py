"""Cartridges in memory: the right bytes or none, within a budget, never dropped while they are used."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch

from foundry.errors import (
    CartridgeNotFound,
    ContextLengthExceeded,
    DigestMismatch,
    InvalidArgument,
    ResourceExhausted,
    RopeUnsupported,
    ShapeMismatch,
)
from foundry.identity import CartridgeBytes, CartridgeHeader
from foundry.model.cartridge import Cartridge
from foundry.model.info import ModelSpec
from foundry.model.rotation import KeyRotation
from foundry.v1.common_pb2 import CartridgeId
from services.rollout.engine import EngineStats, TokenOutput
from services.rollout.residency import Residency

SPEC = ModelSpec(
    fingerprint="blake3:" + "0" * 64,
    num_layers=2,
    num_kv_heads=2,
    head_dim=4,
    hidden_size=16,
    vocab_size=10,
    max_tokens=64,
    rope={"rope_type": "default", "rope_theta": 10_000.0},
)
P = 8
ONE = 2 * 2 * 2 * P * 4 * 4


def stored(
    seed: int, num_tokens: int = P, dtype: torch.dtype = torch.float32, spec: ModelSpec = SPEC
) -> CartridgeBytes:
    shape = spec.kv_shape(num_tokens)
    kv = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return Cartridge(spec.header(num_tokens, 1, dtype), kv).to_bytes()


def named(cartridge: CartridgeBytes, version: int = 1) -> CartridgeId:
    return CartridgeId(name="report", version=version, digest=cartridge.digest())


class DictSource:
    """A store that is a dictionary; `gate` holds every call back, `fetch_gate` fetches only."""

    def __init__(self, *cartridges: CartridgeBytes) -> None:
        self.cartridges = {cartridge.digest(): cartridge for cartridge in cartridges}
        self.looked_up: list[str] = []
        self.fetched: list[str] = []
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.fetch_gate = asyncio.Event()
        self.fetch_gate.set()

    async def header(self, digest: str) -> CartridgeHeader:
        self.looked_up.append(digest)
        self.asked.set()
        await self.gate.wait()
        if digest not in self.cartridges:
            raise CartridgeNotFound(f"no cartridge {digest}")
        return self.cartridges[digest].header

    async def fetch(self, digest: str) -> CartridgeBytes:
        self.fetched.append(digest)
        await self.fetch_gate.wait()
        if digest not in self.cartridges:
            raise CartridgeNotFound(f"no cartridge {digest}")
        self.cartridges[digest].verify(digest)
        return self.cartridges[digest]


class RecordingEngine:
    """Only what residency touches."""

    rotation: KeyRotation | str = KeyRotation(torch.tensor([1.0, 0.01]), ("halves", "halves"))

    def __init__(self) -> None:
        self.loaded: dict[str, Cartridge] = {}

    def load(self, digest: str, cartridge: Cartridge) -> None:
        assert digest not in self.loaded
        self.loaded[digest] = cartridge

    def unload(self, digest: str) -> None:
        del self.loaded[digest]

    def admit(self, requests: object) -> None: ...

    def step(self) -> list[TokenOutput]:
        return []

    def cancel(self, sequence_id: int) -> None: ...

    def stats(self) -> EngineStats:
        return EngineStats(num_running=0, num_waiting=0, num_slots=1, kv_bytes=0, kv_used_bytes=0)


def make(
    source: DictSource, budget_bytes: int = 2 * ONE, host_budget_bytes: int = 0, element_bytes: int = 4
) -> tuple[Residency, RecordingEngine]:
    engine = RecordingEngine()
    residency = Residency(
        SPEC,
        source,
        engine,
        budget_bytes=budget_bytes,
        host_budget_bytes=host_budget_bytes,
        element_bytes=element_bytes,
    )
    return residency, engine


async def test_what_is_loaded_are_the_bytes_of_the_digest() -> None:
    a = stored(0)
    residency, engine = make(DictSource(a))
    assert await residency.load(named(a)) is False
    assert await residency.load(named(a, version=2)) is True
    assert engine.loaded[a.digest()].to_bytes().digest() == a.digest()
    (resident,) = residency.device.residents()
    assert (resident.digest, resident.num_bytes, resident.num_tokens) == (a.digest(), ONE, P)
    assert resident.named.version == 2


async def test_unknown_digest_is_not_found_and_nothing_stands_in() -> None:
    a, b = stored(0), stored(1)
    residency, engine = make(DictSource(a))
    await residency.load(named(a))
    # The name is that of a resident one: names play no part.
    with pytest.raises(CartridgeNotFound):
        await residency.hold([(named(b), 1)])
    assert list(engine.loaded) == [a.digest()]


async def test_a_failed_load_is_tried_again() -> None:
    a = stored(0)
    source = DictSource()
    residency, _ = make(source)
    with pytest.raises(CartridgeNotFound):
        await residency.load(named(a))
    source.cartridges[a.digest()] = a
    assert await residency.load(named(a)) is False


@pytest.mark.timeout(20)
async def test_a_load_that_has_ended_is_not_waited_for_again() -> None:
    """Evicted between the end of its load and the turn of that load's callback: waiting would never give it one."""
    a = stored(0)
    residency, _ = make(DictSource(a))

    async def ended() -> None:
        pass

    task = asyncio.create_task(ended())
    await task
    residency._loads[a.digest()] = task
    assert not await residency.load(named(a))
    assert a.digest() in residency.device


async def test_malformed_digest_names_its_field() -> None:
    residency, _ = make(DictSource())
    with pytest.raises(InvalidArgument) as caught:
        await residency.load(CartridgeId(name="report", version=3))
    assert caught.value.field == "digest"


async def test_wrong_bytes() -> None:
    a, b = stored(0), stored(1)
    source = DictSource()
    source.cartridges[a.digest()] = b
    residency, engine = make(source)
    with pytest.raises(DigestMismatch):
        await residency.load(named(a))
    assert not engine.loaded
    assert not residency.device.residents()


@pytest.mark.parametrize(
    "other",
    [
        replace(SPEC, num_layers=3),
        replace(SPEC, num_kv_heads=1),
        replace(SPEC, head_dim=8),
        replace(SPEC, fingerprint="blake3:" + "1" * 64),
        replace(SPEC, rope={"rope_type": "default", "rope_theta": 500_000.0}),
    ],
    ids=["layers", "heads", "head_dim", "fingerprint", "rope"],
)
async def test_cartridge_of_another_model_is_refused_before_it_moves(other: ModelSpec) -> None:
    a = stored(0, spec=other)
    source = DictSource(a)
    residency, engine = make(source, budget_bytes=10 * ONE)
    with pytest.raises(ShapeMismatch):
        await residency.load(named(a))
    assert not engine.loaded
    assert not source.fetched


async def test_least_recently_used_makes_room() -> None:
    a, b, c = stored(0), stored(1), stored(2)
    source = DictSource(a, b, c)
    residency, engine = make(source)
    await residency.load(named(a))
    await residency.load(named(b))
    await residency.load(named(a))
    await residency.load(named(c))
    assert set(engine.loaded) == {a.digest(), c.digest()}
    # What was dropped comes back by its digest.
    await residency.load(named(b))
    assert set(engine.loaded) == {b.digest(), c.digest()}
    assert source.fetched == [each.digest() for each in (a, b, c, b)]


async def test_what_is_used_stays() -> None:
    a, b, c, d = (stored(seed) for seed in range(4))
    residency, engine = make(DictSource(a, b, c, d))
    hold = await residency.hold([(named(a), 3)])
    await residency.load(named(b))
    await residency.load(named(c))
    assert set(engine.loaded) == {a.digest(), c.digest()}
    assert [each.references for each in residency.device.residents()] == [3, 0]
    other = await residency.hold([(named(a), 1), (named(c), 1)])
    with pytest.raises(ResourceExhausted) as caught:
        await residency.load(named(d))
    assert caught.value.retry_after_seconds is not None
    assert set(engine.loaded) == {a.digest(), c.digest()}
    hold.release()
    hold.release()
    with pytest.raises(ResourceExhausted):
        await residency.load(named(d))
    other.release()
    await residency.load(named(d))
    assert d.digest() in engine.loaded


async def test_a_refused_load_evicts_nothing() -> None:
    a, b, large = stored(0), stored(1), stored(2, num_tokens=2 * P)
    residency, engine = make(DictSource(a, b, large))
    await residency.hold([(named(a), 1)])
    await residency.load(named(b))
    with pytest.raises(ResourceExhausted):
        await residency.load(named(large))
    assert set(engine.loaded) == {a.digest(), b.digest()}


async def test_larger_than_the_whole_budget_can_never_succeed() -> None:
    large = stored(0, num_tokens=3 * P)
    residency, _ = make(DictSource(large))
    with pytest.raises(InvalidArgument, match=f"{3 * ONE} bytes.*{2 * ONE}"):
        await residency.load(named(large))


async def test_the_budget_counts_what_the_engine_makes_of_it() -> None:
    narrow = stored(0, dtype=torch.bfloat16)
    residency, _ = make(DictSource(narrow), element_bytes=4)
    await residency.load(named(narrow))
    assert residency.device.residents()[0].num_bytes == ONE == 2 * len(narrow.data)


async def test_a_hold_that_fails_lets_go_of_what_it_had() -> None:
    a, b = stored(0), stored(1)
    residency, _ = make(DictSource(a))
    with pytest.raises(CartridgeNotFound):
        await residency.hold([(named(a), 1), (named(b), 1)])
    assert [each.references for each in residency.device.residents()] == [0]


async def test_copies_are_made_of_the_verified_bytes_and_each_is_a_resident() -> None:
    a, b = stored(0), stored(1)
    source = DictSource(a, b)
    residency, engine = make(source, budget_bytes=4 * ONE, host_budget_bytes=2 * ONE)
    stack = [named(a), named(b)]
    holds = await asyncio.gather(*(residency.hold([], [(stack, 2)]) for _ in range(3)))
    other = await residency.hold([(named(a), 1), (named(b), 1)], [(stack[::-1], 1)])
    copies = {(each.digest, each.shift): each.references for each in residency.device.residents()}
    assert copies == {(a.digest(), 0): 7, (b.digest(), P): 6, (b.digest(), 0): 2, (a.digest(), P): 1}
    assert {each.num_bytes for each in residency.device.residents()} == {ONE}
    # Once each from the store: a copy is made of what is in host memory.
    assert source.fetched == [a.digest(), b.digest()]
    assert isinstance(engine.rotation, KeyRotation)
    for each in (a, b):
        moved = engine.loaded[f"{each.digest()}+{P}"].kv_L2GPD
        assert moved.equal(engine.rotation.move(Cartridge.from_bytes(each).kv_L2GPD, P))
        assert engine.loaded[each.digest()].to_bytes().digest() == each.digest()
        assert not moved.equal(engine.loaded[each.digest()].kv_L2GPD)
    # All are in use: one more copy finds no room until some are let go.
    with pytest.raises(ResourceExhausted):
        await residency.load(named(a), 2 * P)
    for hold in (*holds, other):
        hold.release()
    await residency.load(named(a), 2 * P)
    assert len(engine.loaded) == 4


async def test_keys_are_moved_where_that_is_known_and_within_the_context() -> None:
    a = stored(0)
    residency, engine = make(DictSource(a))
    with pytest.raises(ContextLengthExceeded) as caught:
        await residency.load(named(a), SPEC.max_tokens - P + 1)
    assert caught.value.field == "cartridges"
    await residency.load(named(a), SPEC.max_tokens - P)
    engine.rotation = "it only records"
    with pytest.raises(RopeUnsupported, match="it only records") as refused:
        await residency.load(named(a), P)
    assert refused.value.field == "rope"
    assert await residency.load(named(a)) is False


async def test_concurrent_loads_share_one_fetch() -> None:
    a = stored(0)
    source = DictSource(a)
    source.gate.clear()
    residency, _ = make(source)
    loads = [asyncio.create_task(residency.hold([(named(a), 1)])) for _ in range(5)]
    await source.asked.wait()
    # The first one gives up: the others still get theirs.
    loads[0].cancel()
    source.gate.set()
    results = await asyncio.gather(*loads, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert source.fetched == [a.digest()]
    assert residency.device.residents()[0].references == 4


async def test_concurrent_failures_reach_everybody() -> None:
    a = stored(0)
    source = DictSource()
    source.gate.clear()
    residency, _ = make(source)
    loads = [asyncio.create_task(residency.load(named(a))) for _ in range(3)]
    await source.asked.wait()
    source.gate.set()
    results = await asyncio.gather(*loads, return_exceptions=True)
    assert [type(result) for result in results] == [CartridgeNotFound] * 3
    assert (len(source.looked_up), len(source.fetched)) == (1, 0)


async def test_concurrent_loads_never_exceed_the_budget() -> None:
    cartridges = [stored(seed) for seed in range(6)]
    residency, engine = make(DictSource(*cartridges))
    holds = [residency.hold([(named(each), 1)]) for each in cartridges]
    results = await asyncio.gather(*holds, return_exceptions=True)
    assert sum(isinstance(result, ResourceExhausted) for result in results) == 4
    assert len(engine.loaded) == 2


async def test_close_ends_loads_under_way() -> None:
    a = stored(0)
    source = DictSource(a)
    source.gate.clear()
    residency, engine = make(source)
    load = asyncio.create_task(residency.load(named(a)))
    await source.asked.wait()
    await residency.close()
    with pytest.raises(asyncio.CancelledError):
        await load
    assert not engine.loaded
