"""Bits that flip on the way between our processes: a typed error that may be retried, and nothing believed."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from google.rpc import status_pb2
from redis.asyncio import Redis

from foundry.errors import AlignmentError, DigestMismatch, StoreUnavailable, Unavailable
from foundry.rpc.answers import Prompt
from foundry.rpc.pods import Pods
from foundry.rpc.rollout import RolloutClient
from foundry.rpc.server import Server
from foundry.rpc.status import from_rpc_error
from foundry.store import CartridgeId, CartridgeStore, StoreSettings
from foundry.v1 import rollout_pb2
from tests.chaos.faults.fault import Fault
from tests.chaos.faults.link import Direction, Harm, Link
from tests.store_data import cartridge, draft
from tests.valkey import Valkey

POLICY = CartridgeId("name", 7, "blake3:" + "7" * 64)


@pytest.fixture
async def redis(valkey: Valkey) -> AsyncIterator[Redis]:
    async with Redis.from_url(valkey.url) as client:
        yield client


@pytest.fixture
async def link(valkey: Valkey) -> AsyncIterator[Link]:
    link = Link(("127.0.0.1", int(valkey.url.rpartition(":")[2])))
    await link.start()
    yield link
    await link.close()


# Of what passes each way while a small version is published by a process that is new to Redis.
@pytest.mark.parametrize(("direction", "num_bytes"), [(Direction.REQUEST, 8000), (Direction.REPLY, 1000)])
async def test_a_flipped_bit_on_the_way_to_redis_moves_no_pointer(
    store: CartridgeStore, store_settings: StoreSettings, redis: Redis, link: Link, direction: Direction, num_bytes: int
) -> None:
    rng = random.Random(5)
    settings = store_settings.model_copy(
        update={"redis_url": type(store_settings.redis_url)(f"redis://{link.address}"), "redis_timeout_seconds": 0.3}
    )
    await store.acquire("report", "run-a", 1)
    digests: dict[int, str] = {}
    num_refused = 0
    for step in range(60):
        # Scripts are sent again, so that their texts are hit too.
        await redis.script_flush()
        tampered = CartridgeStore(settings)
        fault = Fault("flip")
        link.arm(fault, Harm.FLIP, direction, offset=rng.randrange(num_bytes), bit=rng.randrange(8))
        stored = cartridge(step)
        try:
            manifest = await tampered.publish(stored, draft(step=step), durable=False)
            found = await tampered.resolve("report")
            assert (found.version, found.digest) == (manifest.version, manifest.digest)
        except StoreUnavailable:
            num_refused += 1
        link.disarm()
        await tampered.close()
        manifest = await store.publish(stored, draft(step=step), durable=False)
        assert manifest.digest == stored.digest()
        digests[manifest.version] = manifest.digest
        for each in await store.versions("report"):
            assert digests[each.version] == each.digest
            assert (await store.resolve(f"report@{each.version}")).digest == each.digest
    # Bits that only tell the client what it would not have asked for are harmless; most are not.
    assert num_refused > 10


async def test_a_version_whose_copies_are_all_damaged_is_repaired_by_publishing_it_again(
    store: CartridgeStore, redis: Redis, tmp_path: Path
) -> None:
    stored = cartridge(1)
    await store.acquire("report", "run-a", 1)
    manifest = await store.publish(stored, draft(), durable=True)
    blob = next((tmp_path / "objects" / "blobs").rglob("*.safetensors"))
    blob.write_bytes(blob.read_bytes()[:-1] + b"\xff")
    await redis.delete(*[key async for key in redis.scan_iter("foundry:bytes:*")])
    with pytest.raises(DigestMismatch):
        await store.fetch(manifest.digest)
    assert await store.publish(stored, draft(), durable=True) == manifest
    assert bytes((await store.fetch(manifest.digest)).data) == bytes(stored.data)


async def test_a_message_that_cannot_be_read_is_an_error() -> None:
    """gRPC hands out None for it."""

    async def garbage(request: bytes, context: object) -> AsyncIterator[bytes]:
        yield b"\xff\xff\xff"

    async def nothing(request: bytes, context: object) -> bytes:
        return b""

    server = Server("127.0.0.1:0", [rollout_pb2.DESCRIPTOR.services_by_name["Rollout"]])
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "GenerateBatch": grpc.unary_stream_rpc_method_handler(garbage),
        "Resident": grpc.unary_unary_rpc_method_handler(nothing),
    }
    server.grpc.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("foundry.v1.Rollout", handlers)])
    await server.start()
    pods = Pods("rollout", [f"127.0.0.1:{server.port}"])
    rollouts = RolloutClient(pods, "blake3:model", "blake3:template", timeout_seconds=10)
    with pytest.raises(AlignmentError, match="damaged"):
        await rollouts.sample([Prompt([1], seed=0)], POLICY, temperature=1.0, max_new_tokens=8)
    await rollouts.close()
    await server.stop(0)


@pytest.mark.parametrize(
    "details",
    [
        status_pb2.Status(code=5, message="there is no cartridge").SerializeToString(),
        b"\xff no message at all",
    ],
    ids=["contradicts", "unreadable"],
)
def test_a_damaged_status_is_asked_for_again(details: bytes) -> None:
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.NOT_FOUND,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(("grpc-status-details-bin", details)),
        details="there is no cartridGe",
    )
    found = from_rpc_error(error, "rollout")
    assert (type(found), found.reason) == (Unavailable, "UNAVAILABLE")
