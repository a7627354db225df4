"""Bytes that are no message end a call of any service as the caller's fault, in one line of the log."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import grpc
import pytest
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from structlog.testing import capture_logs

from foundry.errors import FoundryError, InvalidArgument
from foundry.rpc.channel import open_channel, typed_errors
from foundry.rpc.server import Server
from foundry.v1 import rollout_pb2, rollout_pb2_grpc, teacher_pb2, teacher_pb2_grpc

OURS: list[ServiceDescriptor] = [
    rollout_pb2.DESCRIPTOR.services_by_name["Rollout"],
    teacher_pb2.DESCRIPTOR.services_by_name["Teacher"],
]
EVERY_SERVICE: list[Any] = [
    *OURS,
    health_pb2.DESCRIPTOR.services_by_name["Health"],
    reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
]
METHODS = [f"/{service.full_name}/{method.name}" for service in EVERY_SERVICE for method in service.methods]
# A group that never ends, a length beyond the end, field number 0.
UNREADABLE = [b"\x0b", b"\x0a\x7f\x01", b"\x00\x00"]


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    """To a server of every service, whose servicers a call of unreadable bytes never reaches."""
    server = Server("127.0.0.1:0", OURS, reflect=True)
    rollout_pb2_grpc.add_RolloutServicer_to_server(rollout_pb2_grpc.RolloutServicer(), server.grpc)
    teacher_pb2_grpc.add_TeacherServicer_to_server(teacher_pb2_grpc.TeacherServicer(), server.grpc)
    await server.start()
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel
    await server.stop(0)


async def send(
    channel: grpc.aio.Channel, method: str, content: bytes, metadata: Sequence[tuple[str, str]] = ()
) -> None:
    """As a client that streams what it asks and gets, which on the wire every call looks like."""
    with typed_errors("server"):
        async for _ in cast(Any, channel.stream_stream(method))(iter([content]), timeout=10, metadata=metadata):
            pass


def random_bytes(draw: random.Random) -> bytes:
    # Of group ends and of the two types that do not exist, at the beginning: none of them is a message.
    return bytes([8 * draw.randrange(1, 16) + draw.choice([4, 6, 7])]) + draw.randbytes(draw.randrange(64))


@pytest.mark.parametrize("method", METHODS)
async def test_what_is_no_message_is_an_invalid_argument(
    channel: grpc.aio.Channel, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    draw = random.Random(0)
    contents = [*UNREADABLE, *(random_bytes(draw) for _ in range(20))]
    with capture_logs() as lines:
        for content in contents:
            with pytest.raises(InvalidArgument, match="not the protobuf message"):
                await send(channel, method, content)
    assert [line["event"] for line in lines] == ["rpc failed"] * len(contents)
    assert not caplog.records


@pytest.mark.parametrize("method", ["/foundry.v1.Rollout/Nothing", "/foundry.v1.Nobody/Generate", "/a.B/C"])
async def test_a_method_that_nobody_has_is_unimplemented(channel: grpc.aio.Channel, method: str) -> None:
    with pytest.raises(FoundryError, match="UNIMPLEMENTED"):
        await send(channel, method, b"\x0b")
