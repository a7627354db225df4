"""A swap pauses nobody: sequences decode on while a large cartridge is fetched, verified and loaded."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Iterator
from statistics import median

import pytest

from foundry.errors import InvalidArgument
from foundry.rpc.channel import open_channel, typed_errors
from foundry.store import Manifest
from foundry.v1 import common_pb2, rollout_pb2, rollout_pb2_grpc
from tests.services import Stack, wait_serving

SEQUENCES, TOKENS = 8, 400
# 512 bytes a token of the tiny model: 64 MiB.
LARGE_TOKENS = 2**17
# What the load itself stops, it stops every time; what the rest of a shared machine stops, it does not.
LOADS = 5
# How many usual steps the longest one may take, in the best of the loads.
MOST_STEPS = 60

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("stall"))
    asyncio.run(stack.valkey.start())
    yield stack
    stack.close()


class Watched:
    """Sequences behind one cartridge, and when tokens of any of them came (seconds)."""

    def __init__(self, stub: rollout_pb2_grpc.RolloutAsyncStub, fingerprint: str, old: common_pb2.CartridgeId) -> None:
        self._stub, self._fingerprint, self._old = stub, fingerprint, old
        self.arrivals: list[float] = []
        self.begun = asyncio.Event()

    async def decode(self) -> None:
        request = rollout_pb2.GenerateRequest(
            model_fingerprint=self._fingerprint,
            token_ids=common_pb2.TokenIds(ids=[5, 6, 7]),
            cartridges=[self._old],
            sampling=rollout_pb2.Sampling(max_new_tokens=TOKENS, n=SEQUENCES, seed=1, ignore_eos=True),
            skip_prefix_cache=True,
        )
        with typed_errors("rollout"):
            async for _ in self._stub.Generate(request, timeout=120):
                self.arrivals.append(time.perf_counter())
                if len(self.arrivals) > 10 * SEQUENCES:
                    self.begun.set()

    def gaps(self, began: float, ended: float) -> list[float]:
        """Between one step and the next (the tokens of one come together), as far as they touch the time given."""
        pairs = zip(self.arrivals, self.arrivals[SEQUENCES:], strict=False)
        return [after - before for before, after in pairs if before < ended and after > began]


def named(manifest: Manifest) -> common_pb2.CartridgeId:
    return common_pb2.CartridgeId(name=manifest.name, version=manifest.version, digest=manifest.digest)


def test_no_gap_while_a_large_cartridge_is_loaded(stack: Stack) -> None:
    (old,) = stack.publish("old", stack.cartridge(1))
    large = stack.publish("new", *(stack.cartridge(seed, num_tokens=LARGE_TOKENS) for seed in (2, 3)))
    rollout = stack.rollout(
        *("--max-sequences", str(SEQUENCES), "--num-threads", "1", "--no-prefetch"),
        # Of the large ones one at a time, so that each load is from the store.
        *("--cartridge-budget-bytes", str(large[0].header.num_bytes * 3 // 2)),
    )
    news = itertools.cycle(large)
    wait_serving(rollout)
    fingerprint = stack.lm.spec.fingerprint

    async def swap(stub: rollout_pb2_grpc.RolloutAsyncStub) -> tuple[float, list[float]]:
        """Seconds of a load from the store, and the gaps meanwhile."""
        watched = Watched(stub, fingerprint, named(old))
        decoding = asyncio.create_task(watched.decode())
        await watched.begun.wait()
        began = time.perf_counter()
        # It is loaded, and then found to be longer than the tiny model's context.
        request = rollout_pb2.GenerateRequest(
            model_fingerprint=fingerprint,
            token_ids=common_pb2.TokenIds(ids=[5]),
            cartridges=[named(next(news))],
            sampling=rollout_pb2.Sampling(max_new_tokens=1),
        )
        with pytest.raises(InvalidArgument, match="maximum context length is"), typed_errors("rollout"):
            await stub.Generate(request, timeout=60).read()
        ended = time.perf_counter()
        await decoding
        return ended - began, watched.gaps(began, ended)

    async def measure() -> tuple[list[float], list[tuple[float, list[float]]]]:
        async with open_channel(rollout.address) as channel:
            stub: rollout_pb2_grpc.RolloutAsyncStub = rollout_pb2_grpc.RolloutStub(channel)
            calm = Watched(stub, fingerprint, named(old))
            await calm.decode()
            return calm.gaps(0, math.inf), [await swap(stub) for _ in range(LOADS)]

    calm, swaps = asyncio.run(measure())
    usual = median(calm)
    largest = [max(gaps) for _, gaps in swaps]
    print(f"calm: {1e3 * usual:.1f} ms between steps, largest {1e3 * max(calm):.1f}")
    print(f"loads of {large[0].header.num_bytes >> 20} MiB:")
    for (seconds, gaps), gap in zip(swaps, largest, strict=True):
        print(f"in {1e3 * seconds:.0f} ms: {len(gaps)} gaps, {1e3 * gap:.1f} ms")
    assert min(len(gaps) for _, gaps in swaps) >= SEQUENCES
    assert min(largest) < MOST_STEPS * usual
