"""How a call ended is what its metrics say: also when the client goes away, and when the fault is ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY

from foundry.errors import CartridgeNotFound, FoundryError
from foundry.rpc.channel import open_channel, typed_errors
from foundry.rpc.server import Server
from foundry.v1 import rollout_pb2, rollout_pb2_grpc


class Ends(rollout_pb2_grpc.RolloutServicer):
    """Each method ends in its own way."""

    def __init__(self) -> None:
        self.given_up = asyncio.Event()

    async def Resident(self, request: Any, context: Any) -> rollout_pb2.ResidentResponse:
        return rollout_pb2.ResidentResponse()

    async def GenerateBatch(self, request: Any, context: Any) -> AsyncIterator[rollout_pb2.GenerateBatchResponse]:
        yield rollout_pb2.GenerateBatchResponse()
        raise CartridgeNotFound("no such cartridge")

    async def Drain(self, request: Any, context: Any) -> rollout_pb2.DrainResponse:
        raise RuntimeError("a fault of ours")

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[rollout_pb2.GenerateChunk]:
        try:
            yield rollout_pb2.GenerateChunk()
            await asyncio.Event().wait()
        finally:
            self.given_up.set()


def answered(method: str, code: str) -> float:
    labels = {"method": method, "code": code}
    return REGISTRY.get_sample_value("foundry_rpc_server_seconds_count", labels) or 0.0


def failed(method: str, reason: str) -> float:
    labels = {"method": method, "reason": reason}
    return REGISTRY.get_sample_value("foundry_rpc_server_errors_total", labels) or 0.0


async def test_calls_are_counted_by_how_they_end() -> None:
    codes = [("Resident", "OK"), ("GenerateBatch", "NOT_FOUND"), ("Drain", "UNKNOWN"), ("Generate", "CANCELLED")]
    reasons = [("GenerateBatch", "CARTRIDGE_NOT_FOUND"), ("Drain", "INTERNAL"), ("Generate", "CANCELLED")]
    before = [answered(*each) for each in codes], [failed(*each) for each in reasons]
    server = Server("127.0.0.1:0", [rollout_pb2.DESCRIPTOR.services_by_name["Rollout"]])
    ends = Ends()
    rollout_pb2_grpc.add_RolloutServicer_to_server(ends, server.grpc)
    await server.start()
    channel = open_channel(f"127.0.0.1:{server.port}")
    try:
        stub: rollout_pb2_grpc.RolloutAsyncStub = rollout_pb2_grpc.RolloutStub(channel)
        await stub.Resident(rollout_pb2.ResidentRequest(), timeout=10)
        with pytest.raises(CartridgeNotFound), typed_errors("rollout"):
            async for _ in stub.GenerateBatch(rollout_pb2.GenerateBatchRequest(), timeout=10):
                pass
        with pytest.raises(FoundryError), typed_errors("rollout"):
            await stub.Drain(rollout_pb2.DrainRequest(), timeout=10)
        call: grpc.aio.UnaryStreamCall[Any, Any] = stub.Generate(rollout_pb2.GenerateRequest(), timeout=10)
        await call.read()
        call.cancel()
        await ends.given_up.wait()
    finally:
        await channel.close()
        await server.stop(1)
    assert [answered(*each) for each in codes] == [count + 1 for count in before[0]]
    assert [failed(*each) for each in reasons] == [before[1][0] + 1, before[1][1] + 1, before[1][2]]
