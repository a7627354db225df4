"""New versions are resident before anybody asks for them, and nothing depends on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from prometheus_client import REGISTRY

from foundry.identity import CartridgeBytes
from foundry.model.cartridge import Cartridge
from foundry.model.lm import FrozenLM
from foundry.rpc.channel import open_channel, typed_errors
from foundry.store import CartridgeId, CartridgeStore, Manifest, ManifestDraft, Published, StoreSettings
from foundry.v1 import common_pb2, rollout_pb2, rollout_pb2_grpc
from services.rollout.prefetch import Prefetch
from services.rollout.serving import Serving, torch_engine
from services.rollout.settings import RolloutSettings
from tests.contract.rollout.server import TIMEOUT_SECONDS, Gate, served
from tests.valkey import Valkey

NAME, RUN = "moving", "run-moving"
NUM_TOKENS = 40


class Rollout:
    """A server on a real store, the publisher of a name, and calls to the server."""

    def __init__(self, lm: FrozenLM, store: CartridgeStore, gate: Gate, channel: Any) -> None:
        self._lm, self._store, self.gate = lm, store, gate
        self._stub: rollout_pb2_grpc.RolloutAsyncStub = rollout_pb2_grpc.RolloutStub(channel)

    def cartridge(self, seed: int) -> Cartridge:
        spec = self._lm.spec
        shape = spec.kv_shape(16)
        kv = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return Cartridge(spec.header(16, 1, torch.float32), kv)

    async def publish(self, step: int, name: str = NAME) -> Manifest:
        await self._store.acquire(name, RUN, 1)
        draft = ManifestDraft(name=name, run=RUN, attempt=1, step=step)
        return await self._store.publish(self.cartridge(step).to_bytes(), draft, durable=True)

    def call(self, digest: str, *, name: str = NAME) -> Any:
        return self._stub.Generate(
            rollout_pb2.GenerateRequest(
                model_fingerprint=self._lm.spec.fingerprint,
                token_ids=common_pb2.TokenIds(ids=[5, 6, 7]),
                cartridges=[common_pb2.CartridgeId(name=name, version=1, digest=digest)],
                sampling=rollout_pb2.Sampling(temperature=0, max_new_tokens=NUM_TOKENS, ignore_eos=True),
                skip_prefix_cache=True,
            ),
            timeout=TIMEOUT_SECONDS,
        )

    async def generate(self, digest: str, *, name: str = NAME) -> list[int]:
        with typed_errors("rollout"):
            return [token_id async for chunk in self.call(digest, name=name) for token_id in chunk.ids]

    async def residents(self) -> dict[str, rollout_pb2.ResidentCartridge]:
        answer = await self._stub.Resident(rollout_pb2.ResidentRequest(), timeout=TIMEOUT_SECONDS)
        return {each.cartridge.digest: each for each in answer.cartridges}

    async def until_resident(self, digest: str) -> dict[str, rollout_pb2.ResidentCartridge]:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while digest not in (residents := await self.residents()):
                pass
        return residents

    def greedy(self, seed: int) -> list[int]:
        """Offline: one whole forward a token."""
        answer: list[int] = []
        while len(answer) < NUM_TOKENS:
            hidden = self._lm.packed_hidden([[5, 6, 7, *answer]], [self.cartridge(seed).kv_L2GPD])
            answer.append(int(self._lm.logits(hidden[-1:]).argmax()))
        return answer


@asynccontextmanager
async def serving(
    lm: FrozenLM, directory: Path, store: CartridgeStore, store_settings: StoreSettings, *, prefetching: bool = True
) -> AsyncIterator[Rollout]:
    settings = RolloutSettings(model=directory, store=store_settings, max_sequences=4, max_sequence_tokens=256)
    parts = Serving.build(settings, lm.info, torch_engine(settings, lm), store)

    def subscribe(last_event_id: str) -> AsyncIterator[Published]:
        # From the beginning, so that no test races with the first read of "$".
        return store.subscribe("0-0" if last_event_id == "$" else last_event_id)

    prefetch, gate = Prefetch(parts.residency, subscribe), Gate()
    async with served(parts, gate) as address, open_channel(address) as channel:
        if prefetching:
            prefetch.start()
        try:
            yield Rollout(lm, store, gate, channel)
        finally:
            await prefetch.close()


def prefetches(result: str) -> float:
    return REGISTRY.get_sample_value("foundry_cartridge_prefetches_total", {"result": result}) or 0.0


async def test_a_new_version_is_resident_unasked_while_the_old_one_decodes(
    lm: FrozenLM, directory: Path, store: CartridgeStore, store_settings: StoreSettings
) -> None:
    async with serving(lm, directory, store, store_settings) as rollout:
        old = await rollout.publish(1)
        call = rollout.call(old.digest)
        rollout.gate.allow(2)
        ids = list((await call.read()).ids)
        # The engine waits for the gate from here on: the old version is in use all the time.
        new = await rollout.publish(2)
        residents = await rollout.until_resident(new.digest)
        assert set(residents) == {old.digest, new.digest}
        assert (residents[old.digest].references, residents[new.digest].references) == (1, 0)
        assert residents[new.digest].cartridge.version == new.version == 2
        rollout.gate.open()
        ids += [token_id async for chunk in call for token_id in chunk.ids]
        assert ids == rollout.greedy(1)
        assert await rollout.generate(new.digest) == rollout.greedy(2) != rollout.greedy(1)


async def test_names_that_nobody_asks_for_here_are_left_alone(
    lm: FrozenLM, directory: Path, store: CartridgeStore, store_settings: StoreSettings
) -> None:
    async with serving(lm, directory, store, store_settings) as rollout:
        rollout.gate.open()
        old = await rollout.publish(1)
        await rollout.generate(old.digest)
        other = await rollout.publish(2, name="other")
        # Events come in order: when this one was followed, the one before had been seen.
        new = await rollout.publish(3)
        assert other.digest not in await rollout.until_resident(new.digest)


async def test_a_cartridge_that_cannot_be_loaded_is_counted_and_the_next_one_comes(
    lm: FrozenLM, directory: Path, store: CartridgeStore, store_settings: StoreSettings
) -> None:
    async with serving(lm, directory, store, store_settings) as rollout:
        rollout.gate.open()
        await rollout.generate((await rollout.publish(1)).digest)
        failed = prefetches("failed")
        stored = rollout.cartridge(2).to_bytes()
        alien = CartridgeBytes(replace(stored.header, position_offset=1), stored.data)
        await store.publish(alien, ManifestDraft(name=NAME, run=RUN, attempt=1, step=2), durable=True)
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while prefetches("failed") == failed:
                await rollout.residents()
        new = await rollout.publish(3)
        assert alien.digest() not in await rollout.until_resident(new.digest)
        assert prefetches("failed") == failed + 1


async def test_lost_events_cost_nothing_but_time(
    lm: FrozenLM, directory: Path, store: CartridgeStore, store_settings: StoreSettings, valkey: Valkey
) -> None:
    """Redis is killed and comes back empty: the announcements of before are gone, and so is the subscription."""
    async with serving(lm, directory, store, store_settings) as rollout:
        rollout.gate.open()
        first = await rollout.publish(1)
        await rollout.generate(first.digest)
        valkey.kill()
        await valkey.start()
        assert await store.rebuild()
        missed = await rollout.publish(2)
        await store._connection.redis.delete("foundry:events")
        # Whether or not the event was read before it was deleted: the bytes are right.
        assert await rollout.generate(missed.digest) == rollout.greedy(2)
        # And the subscription has come back.
        new = await rollout.publish(3)
        await rollout.until_resident(new.digest)
        assert await rollout.generate(new.digest) == rollout.greedy(3)


async def test_without_prefetch_requests_fetch_what_they_name(
    lm: FrozenLM, directory: Path, store: CartridgeStore, store_settings: StoreSettings
) -> None:
    async with serving(lm, directory, store, store_settings, prefetching=False) as rollout:
        rollout.gate.open()
        for step in (1, 2):
            manifest = await rollout.publish(step)
            assert manifest.digest not in await rollout.residents()
            assert await rollout.generate(manifest.digest) == rollout.greedy(step)


class NoResidency:
    """Everything is served; loads wait for `gate`."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.started = asyncio.Event()
        self.loaded: list[tuple[str, int]] = []

    def served_within(self, name: str, seconds: float) -> bool:
        return name != "unserved"

    async def prefetch(self, cartridge: common_pb2.CartridgeId) -> bool:
        self.loaded.append((cartridge.name, cartridge.version))
        self.started.set()
        await self.gate.wait()
        return False


async def test_the_newest_of_each_name_wins_and_the_queue_is_bounded() -> None:
    async def nothing(_: str) -> AsyncIterator[Published]:
        await asyncio.Event().wait()
        yield  # type: ignore[misc]

    residency = NoResidency()
    prefetch = Prefetch(residency, nothing)  # type: ignore[arg-type]
    prefetch.start()
    digest = "blake3:" + "0" * 64
    prefetch.announce(CartridgeId("a", 1, digest))
    await residency.started.wait()
    for name, version in (("a", 2), ("b", 1), ("a", 3), ("b", 3), ("b", 2), ("unserved", 1)):
        prefetch.announce(CartridgeId(name, version, digest))
    # One at a time, whatever was announced meanwhile.
    assert residency.loaded == [("a", 1)]
    dropped = prefetches("dropped")
    for index in range(63):
        prefetch.announce(CartridgeId(f"more-{index}", 1, digest))
    assert prefetches("dropped") == dropped + 1
    residency.gate.set()
    done = prefetches("loaded") + 65
    async with asyncio.timeout(TIMEOUT_SECONDS):
        for _ in range(1000):
            await asyncio.sleep(0)
    assert prefetches("loaded") == done
    # The one that had waited longest was dropped: version 3 of a.
    assert residency.loaded[1:] == [("b", 3), *((f"more-{index}", 1) for index in range(63))]
    await prefetch.close()
