"""How a request finds its rollout server: real calls, of servers that fail when a test says so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from foundry.errors import DeadlineExceeded, Unavailable
from foundry.rpc.access import Access, token_of
from foundry.rpc.pods import Pods
from foundry.rpc.tokens import make_tokens
from foundry.v1 import rollout_pb2, rollout_pb2_grpc
from services.gateway.balancer import RolloutBalancer
from tests.contract.scripted_rollout import serving

Chunk = rollout_pb2.GenerateChunk


class Streaming(rollout_pb2_grpc.RolloutServicer):
    """Streams `num_chunks`, each with its number. Then it is Unavailable (`fails`), or waits until it is cancelled."""

    def __init__(self, num_chunks: int, *, fails: bool = False, waits: bool = False, num_bytes: int = 0) -> None:
        self.num_chunks, self.fails, self.waits, self.num_bytes = num_chunks, fails, waits, num_bytes
        self.num_calls = 0
        self.num_sent = 0
        self.ended = asyncio.Event()

    async def Generate(self, request: rollout_pb2.GenerateRequest, context: object) -> AsyncIterator[Chunk]:
        self.num_calls += 1
        try:
            for index in range(self.num_chunks):
                yield Chunk(index=index, text="x" * self.num_bytes)
                self.num_sent += 1
            if self.fails:
                raise Unavailable("going away")
            if self.waits:
                await asyncio.Event().wait()
        finally:
            self.ended.set()

    async def Resident(self, request: rollout_pb2.ResidentRequest, context: object) -> rollout_pb2.ResidentResponse:
        return rollout_pb2.ResidentResponse(model_name="tiny", model_fingerprint="blake3:model")


@asynccontextmanager
async def balanced(*servers: Streaming, retry_timeout_seconds: float = 30) -> AsyncIterator[RolloutBalancer]:
    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(serving(server)) for server in servers]
        pods = Pods("rollout", [f"127.0.0.1:{server.port}" for server in opened])
        balancer = RolloutBalancer(pods, poll_seconds=3600, retry_timeout_seconds=retry_timeout_seconds)
        await balancer.start()
        try:
            yield balancer
        finally:
            await balancer.close()


class Reader:
    """Takes chunks for as long as it is `going`."""

    def __init__(self, balancer: RolloutBalancer) -> None:
        self._balancer = balancer
        self.received: list[int] = []
        self.begun, self.going = asyncio.Event(), asyncio.Event()
        self.going.set()

    async def read(self, request_id: str = "", *, seconds: float = 30) -> list[int]:
        request = rollout_pb2.GenerateRequest(request_id=request_id)
        await self._balancer.generate(request, self._take, deadline=time.monotonic() + seconds)
        return self.received

    async def _take(self, chunk: Chunk) -> None:
        self.received.append(chunk.index)
        self.begun.set()
        await self.going.wait()


async def test_a_call_that_fails_before_its_first_chunk_is_made_elsewhere() -> None:
    failing, good = Streaming(0, fails=True), Streaming(3)
    async with balanced(failing, good) as balancer:
        for number in range(20):
            assert await Reader(balancer).read(f"request-{number}") == [0, 1, 2]
    assert (failing.num_calls, good.num_calls) == (1, 20), "one that failed is left alone until it is looked at again"


async def test_a_server_that_refuses_the_gateway_is_one_that_is_away(tmp_path: Path) -> None:
    """Whoever asks the gateway has shown nothing that could be wrong: it is the gateway's token that was not taken."""
    for directory in (tmp_path / "ours", tmp_path / "others"):
        make_tokens(directory)
    async with serving(Streaming(1), access=Access(tmp_path / "ours" / "servers")) as server:
        address = f"127.0.0.1:{server.port}"
        pods = Pods("rollout", [address], token=token_of("gateway", tmp_path / "ours" / "gateway"))
        balancer = RolloutBalancer(pods, poll_seconds=3600, retry_timeout_seconds=0)
        await balancer.start()
        assert await Reader(balancer).read() == [0]
    async with serving(Streaming(1), address, access=Access(tmp_path / "others" / "servers")):
        with pytest.raises(Unavailable, match=r"refuses this gateway: .* none of this server's"):
            await Reader(balancer).read()
        await balancer.refresh()
        with pytest.raises(Unavailable, match=r"no rollout server answers at .* none of this server's"):
            await Reader(balancer).read()
        await balancer.close()


async def test_a_call_is_made_again_once_its_only_server_is_back() -> None:
    server = Streaming(0, fails=True)
    async with balanced(server) as balancer:
        reading = asyncio.create_task(Reader(balancer).read())
        await server.ended.wait()
        server.num_chunks, server.fails = 2, False
        assert await reading == [0, 1]


async def test_a_call_that_fails_later_is_not_repeated() -> None:
    servers = Streaming(2, fails=True), Streaming(2, fails=True)
    async with balanced(*servers) as balancer:
        reader = Reader(balancer)
        with pytest.raises(Unavailable, match="going away"):
            await reader.read()
    assert reader.received == [0, 1]
    assert sum(server.num_calls for server in servers) == 1


@pytest.mark.parametrize(("retry_timeout_seconds", "seconds"), [(0, 30), (30, 0.01)])
async def test_trying_again_comes_to_an_end(retry_timeout_seconds: float, seconds: float) -> None:
    async with balanced(Streaming(0, fails=True), retry_timeout_seconds=retry_timeout_seconds) as balancer:
        with pytest.raises((Unavailable, DeadlineExceeded)):
            await Reader(balancer).read(seconds=seconds)


async def test_cancelling_ends_the_call() -> None:
    server = Streaming(1, waits=True)
    async with balanced(server) as balancer:
        reader = Reader(balancer)
        reading = asyncio.create_task(reader.read())
        await reader.begun.wait()
        reading.cancel()
        await server.ended.wait()


async def test_a_slow_reader_slows_the_server() -> None:
    server = Streaming(100, num_bytes=2**18)
    async with balanced(server) as balancer:
        reader = Reader(balancer)
        reader.going.clear()
        reading = asyncio.create_task(reader.read())
        await reader.begun.wait()
        # Round trips on the same connection, in which a server that did not wait would send it all.
        for _ in range(30):
            await balancer.refresh()
        assert reader.received == [0]
        assert server.num_sent < 50
        reader.going.set()
        assert await reading == [*range(100)]
