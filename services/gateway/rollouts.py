"""The rollout servers: who is there, what they serve, and which of them answers a request."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import socket
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import grpc
import structlog
from blake3 import blake3

from foundry.errors import DeadlineExceeded, FingerprintMismatch, FoundryError, Unavailable
from foundry.rpc.channel import open_channel, typed_errors
from foundry.v1 import rollout_pb2, rollout_pb2_grpc
from services.gateway import metrics

log = structlog.get_logger(__name__)

# Consistent hashing with bounded loads (https://arxiv.org/abs/1608.01350): no server gets 1.25 times the mean.
_LOAD_FACTOR = 1.25
_RESIDENT_TIMEOUT_SECONDS = 5.0
Metadata = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The frozen model behind the rollout servers."""

    name: str
    fingerprint: str
    template_digest: str
    max_sequence_tokens: int


class Pod:
    """One rollout server. `model` is None while it does not answer."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = open_channel(address)
        self.stub = rollout_pb2_grpc.RolloutStub(self.channel)
        self.model: ServedModel | None = None
        self.in_flight = 0

    async def look(self) -> None:
        try:
            with typed_errors(self.address):
                answer = await self.stub.Resident(rollout_pb2.ResidentRequest(), timeout=_RESIDENT_TIMEOUT_SECONDS)
        except FoundryError as error:
            if self.model is not None:
                log.warning("rollout server is gone", address=self.address, error=error.message)
            self.model = None
            return
        found = ServedModel(
            answer.model_name, answer.model_fingerprint, answer.template_digest, answer.max_sequence_tokens
        )
        if found != self.model:
            log.info("rollout server found", address=self.address, model=found.name, fingerprint=found.fingerprint)
        self.model = found


class Rollouts:
    """Channels to every rollout server; looks again every `poll_seconds`."""

    def __init__(self, addresses: Sequence[str], *, poll_seconds: float, retry_timeout_seconds: float) -> None:
        self._addresses = addresses
        self._poll_seconds = poll_seconds
        self._retry_timeout_seconds = retry_timeout_seconds
        self._pods: dict[str, Pod] = {}
        self._resolved: dict[str, list[str]] = {}
        self._last: ServedModel | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.refresh()
        self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        tasks = [task for task in (self._watcher, self._looking) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(pod.channel.close() for pod in self._pods.values()))

    def model(self) -> ServedModel:
        """What is served now, or was last: requests wait out a short absence.

        Raises Unavailable, FingerprintMismatch.
        """
        by_fingerprint = {
            pod.model.fingerprint: pod.model
            for _, pod in sorted(self._pods.items(), reverse=True)
            if pod.model is not None
        }
        if len(by_fingerprint) > 1:
            served = ", ".join(f"{pod.address}: {pod.model.fingerprint}" for pod in self._pods.values() if pod.model)
            raise FingerprintMismatch(f"the rollout servers serve different models: {served}")
        if by_fingerprint:
            (self._last,) = by_fingerprint.values()
        if self._last is None:
            raise self._nobody()
        return self._last

    def num_reachable(self) -> int:
        return sum(pod.model is not None for pod in self._pods.values())

    async def generate(
        self, request: rollout_pb2.GenerateRequest, *, deadline: float, metadata: Metadata = ()
    ) -> AsyncGenerator[rollout_pb2.GenerateChunk, None]:
        """Chunks of one request, whose deadline is in `time.monotonic()`. Closing the generator cancels the call.

        An attempt that is Unavailable before its first chunk is repeated elsewhere, or in the same place a little
        later: it has had no effect. Raises FoundryError.
        """
        # Without a cartridge any server is as good as another.
        key = request.cartridges[0].digest if request.cartridges else request.request_id
        give_up = min(deadline, time.monotonic() + self._retry_timeout_seconds)
        backoff_seconds = 0.05
        tried: set[str] = set()
        while True:
            started = False
            try:
                pod = self._pick(key, tried)
                async with contextlib.aclosing(_attempt(pod, request, deadline, metadata)) as chunks:
                    async for chunk in chunks:
                        started = True
                        yield chunk
                return
            except Unavailable:
                if started or time.monotonic() + backoff_seconds > give_up:
                    raise
                metrics.ROLLOUT_RETRIES.inc()
            if all(pod.model is None or pod.address in tried for pod in self._pods.values()):
                # Half to all of it at random, so that requests that failed together do not come back together.
                await asyncio.sleep(backoff_seconds * random.uniform(0.5, 1.0))
                backoff_seconds = min(1.0, 2 * backoff_seconds)
                tried.clear()
                await self.refresh()

    def _pick(self, key: str, tried: set[str]) -> Pod:
        """The first in rendezvous order of `key` that is not above its share of the load."""
        pods = [pod for pod in self._pods.values() if pod.model is not None and pod.address not in tried]
        if not pods:
            raise self._nobody()
        bound = math.ceil(_LOAD_FACTOR * (sum(pod.in_flight for pod in pods) + 1) / len(pods))
        pods.sort(key=lambda pod: blake3(f"{key} {pod.address}".encode()).digest(), reverse=True)
        pod = next(pod for pod in pods if pod.in_flight < bound)
        tried.add(pod.address)
        return pod

    def _nobody(self) -> Unavailable:
        return Unavailable(f"no rollout server answers at {', '.join(self._addresses)}", retry_after_seconds=1.0)

    async def refresh(self) -> None:
        """Look up the addresses and ask every server what it serves. Callers at the same time share one look."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        await asyncio.shield(self._looking)

    async def _look(self) -> None:
        for address in self._addresses:
            await self._resolve(address)
        current = {found for resolved in self._resolved.values() for found in resolved}
        for address in current - self._pods.keys():
            self._pods[address] = Pod(address)
        for address in self._pods.keys() - current:
            self._pods[address].model = None
            if self._pods[address].in_flight == 0:
                await self._pods.pop(address).channel.close()
        await asyncio.gather(*(self._pods[address].look() for address in current))
        metrics.ROLLOUTS_REACHABLE.set(self.num_reachable())

    async def _resolve(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        except OSError as error:
            # A name server that hiccups does not take working servers away.
            log.warning("address does not resolve", address=address, error=str(error))
            return
        hosts = {f"[{where[0]}]" if family == socket.AF_INET6 else str(where[0]) for family, _, _, _, where in found}
        self._resolved[address] = [f"{found_host}:{port}" for found_host in sorted(hosts)]

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            await self.refresh()


async def _attempt(
    pod: Pod, request: rollout_pb2.GenerateRequest, deadline: float, metadata: Metadata
) -> AsyncGenerator[rollout_pb2.GenerateChunk, None]:
    timeout_seconds = deadline - time.monotonic()
    if timeout_seconds <= 0:
        raise DeadlineExceeded("the request's time ran out before a rollout server took it")
    pod.in_flight += 1
    call: grpc.aio.UnaryStreamCall[rollout_pb2.GenerateRequest, rollout_pb2.GenerateChunk] = pod.stub.Generate(
        request, timeout=timeout_seconds, metadata=metadata
    )
    try:
        with typed_errors(pod.address):
            async for chunk in call:
                yield chunk
    except Unavailable as error:
        # Its store being away says nothing about the server itself.
        if type(error) is Unavailable:
            pod.model = None
        raise
    finally:
        pod.in_flight -= 1
        call.cancel()
