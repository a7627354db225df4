"""A rollout server in this process on a tiny model, whose engine can be made to take only the steps a test allows."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from foundry.errors import CartridgeNotFound
from foundry.identity import CartridgeBytes, CartridgeHeader
from foundry.model.cartridge import Cartridge
from foundry.model.lm import FrozenLM
from foundry.rpc.channel import open_channel, typed_errors
from foundry.rpc.server import Server
from foundry.v1 import common_pb2, rollout_pb2, rollout_pb2_grpc
from services.rollout.driver import Submission
from services.rollout.servicer import RolloutServicer
from services.rollout.serving import Serving, torch_engine
from services.rollout.settings import RolloutSettings

TIMEOUT_SECONDS = 30.0
MAX_SEQUENCES, MAX_WAITING = 4, 12
STORE: dict[str, Any] = {"redis_url": "redis://127.0.0.1:1/0", "objects_url": "memory://", "redis_timeout_seconds": 0.5}


class DictSource:
    def __init__(self) -> None:
        self.cartridges: dict[str, CartridgeBytes] = {}

    async def header(self, digest: str) -> CartridgeHeader:
        return (await self.fetch(digest)).header

    async def fetch(self, digest: str) -> CartridgeBytes:
        if digest not in self.cartridges:
            raise CartridgeNotFound(f"no cartridge {digest}")
        self.cartridges[digest].verify(digest)
        return self.cartridges[digest]


class Gate:
    """Lets the engine take only the steps that a test allows."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self._open = False
        self.failure: Exception | None = None

    def allow(self, num_steps: int) -> None:
        self._permits.release(num_steps)

    def open(self) -> None:
        self._open = True
        self._permits.release()

    def wait(self) -> None:
        if not self._open:
            self._permits.acquire()
        if self.failure is not None:
            raise self.failure


class Rollout:
    """A running server, its parts, and calls with deadlines and typed errors."""

    def __init__(
        self, lm: FrozenLM, parts: Serving, source: DictSource, address: str, channel: grpc.aio.Channel
    ) -> None:
        self.lm, self.parts, self.source, self.address, self.channel = lm, parts, source, address, channel
        self.stub: rollout_pb2_grpc.RolloutAsyncStub = rollout_pb2_grpc.RolloutStub(channel)
        # What the servicer asked of the driver, as it happens.
        self.submitted: asyncio.Queue[Submission] = asyncio.Queue()
        self.cancelled: asyncio.Queue[Submission] = asyncio.Queue()
        self.draining = asyncio.Event()
        driver = parts.driver
        submit, cancel, drain = driver.submit, driver.cancel, driver.drain

        def noting_submit(*args: Any, **kwargs: Any) -> Submission:
            submission = submit(*args, **kwargs)
            self.submitted.put_nowait(submission)
            return submission

        def noting_cancel(submission: Submission) -> None:
            cancel(submission)
            self.cancelled.put_nowait(submission)

        async def noting_drain() -> None:
            waiting = asyncio.ensure_future(drain())
            await asyncio.sleep(0)
            self.draining.set()
            await waiting

        driver.submit, driver.cancel, driver.drain = noting_submit, noting_cancel, noting_drain

    def publish(self, seed: int, num_tokens: int = 16, version: int = 1) -> common_pb2.CartridgeId:
        spec = self.lm.spec
        shape = spec.kv_shape(num_tokens)
        kv = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        stored = Cartridge(spec.header(num_tokens, 1, torch.float32), kv).to_bytes()
        self.source.cartridges[stored.digest()] = stored
        return common_pb2.CartridgeId(name="report", version=version, digest=stored.digest())

    def request(
        self,
        ids: Sequence[int] = (5, 6, 7, 8, 9),
        *,
        cartridges: Sequence[common_pb2.CartridgeId] = (),
        sampling: dict[str, Any] | None = None,
        **fields: Any,
    ) -> rollout_pb2.GenerateRequest:
        if "text" not in fields and "conversation" not in fields:
            fields["token_ids"] = common_pb2.TokenIds(ids=ids)
        fields.setdefault("model_fingerprint", self.lm.spec.fingerprint)
        wanted = {"max_new_tokens": 6, "seed": 1, "ignore_eos": True, **(sampling or {})}
        return rollout_pb2.GenerateRequest(cartridges=cartridges, sampling=rollout_pb2.Sampling(**wanted), **fields)

    async def generate(self, request: rollout_pb2.GenerateRequest) -> list[rollout_pb2.GenerateChunk]:
        with typed_errors("rollout"):
            return [chunk async for chunk in self.stub.Generate(request, timeout=TIMEOUT_SECONDS)]

    async def batch(self, requests: Sequence[rollout_pb2.GenerateRequest]) -> dict[tuple[int, int], Any]:
        """Completions by place of the request and index."""
        message = rollout_pb2.GenerateBatchRequest(requests=requests)
        with typed_errors("rollout"):
            answers = [answer async for answer in self.stub.GenerateBatch(message, timeout=TIMEOUT_SECONDS)]
        found = {(answer.request_index, answer.completion.index): answer.completion for answer in answers}
        assert len(found) == len(answers)
        return found

    async def resident(self) -> rollout_pb2.ResidentResponse:
        with typed_errors("rollout"):
            return await self.stub.Resident(rollout_pb2.ResidentRequest(), timeout=TIMEOUT_SECONDS)


@asynccontextmanager
async def served(parts: Serving, gate: Gate | None) -> AsyncIterator[str]:
    """The address of a server of `parts`."""
    step = parts.driver._engine.step
    if gate is not None:

        def gated_step() -> Any:
            gate.wait()
            return step()

        parts.driver._engine.step = gated_step
    server = Server("127.0.0.1:0", [rollout_pb2.DESCRIPTOR.services_by_name["Rollout"]])
    servicer = RolloutServicer(server.set_not_serving)
    rollout_pb2_grpc.add_RolloutServicer_to_server(servicer, server.grpc)
    await server.start()
    parts.driver.start()
    servicer.begin(parts)
    await server.set_serving()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        if gate is not None:
            gate.open()
        await server.stop(0)
        await parts.residency.close()
        await parts.driver.close()


@asynccontextmanager
async def serving(lm: FrozenLM, directory: Path, gate: Gate | None = None, **settings: Any) -> AsyncIterator[Rollout]:
    values = {
        "model": directory,
        "store": STORE,
        "max_sequences": MAX_SEQUENCES,
        "max_waiting": MAX_WAITING,
        "max_sequence_tokens": 256,
        "prefill_tokens_per_step": 32,
        **settings,
    }
    source = DictSource()
    parsed = RolloutSettings(**values)
    parts = Serving.build(parsed, lm.info, torch_engine(parsed, lm), source)
    async with served(parts, gate) as address, open_channel(address) as channel:
        yield Rollout(lm, parts, source, address, channel)


def joined(chunks: Sequence[rollout_pb2.GenerateChunk], index: int = 0) -> tuple[list[int], list[float], str]:
    mine = [chunk for chunk in chunks if chunk.index == index]
    return (
        [token_id for chunk in mine for token_id in chunk.ids],
        [logprob for chunk in mine for logprob in chunk.logprobs],
        "".join(chunk.text for chunk in mine),
    )


def long(rollout: Rollout, **fields: Any) -> rollout_pb2.GenerateRequest:
    return rollout.request(sampling={"max_new_tokens": 250}, **fields)


async def status(channel: grpc.aio.Channel) -> int:
    request = health_pb2.HealthCheckRequest(service="foundry.v1.Rollout")
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return int((await stub.Check(request, timeout=TIMEOUT_SECONDS)).status)


@asynccontextmanager
async def loop_watched(*, most_seconds: float) -> AsyncIterator[None]:
    """Fails if the event loop was held up for longer meanwhile."""
    longest, last = 0.0, time.perf_counter()

    async def watch() -> None:
        nonlocal longest, last
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
    assert longest < most_seconds
