"""The rollout servers: who is there, what they serve, and which of them answers a request."""

from __future__ import annotations

import asyncio
import math
import random
import secrets
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import structlog

from foundry.errors import (
    DeadlineExceeded,
    FingerprintMismatch,
    FoundryError,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from foundry.rpc.channel import decoded
from foundry.rpc.pods import Pod, Pods, rendezvous
from foundry.tasks import end
from foundry.v1 import rollout_pb2, rollout_pb2_grpc
from services.gateway import metrics

Chunk = rollout_pb2.GenerateChunk
log = structlog.get_logger(__name__)
T = TypeVar("T")

# Consistent hashing with bounded loads (https://arxiv.org/abs/1608.01350): no server gets 1.25 times the mean.
_LOAD_FACTOR = 1.25
_RESIDENT_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The frozen model behind the rollout servers."""

    name: str
    fingerprint: str
    template_digest: str
    max_sequence_tokens: int
    # Of the chat template: see foundry.model.template_features.
    renders: frozenset[str] = frozenset()
    variables: frozenset[str] = frozenset()
    tool_format: str = ""


class RolloutServer:
    """One rollout server. `model` is None while it does not answer."""

    def __init__(self, pod: Pod) -> None:
        self.pod = pod
        self.model: ServedModel | None = None
        # Why it did not answer.
        self.error = ""

    async def look(self) -> None:
        try:
            with self.pod.calling() as channel:
                stub = rollout_pb2_grpc.RolloutStub(channel)
                answer = await stub.Resident(rollout_pb2.ResidentRequest(), timeout=_RESIDENT_TIMEOUT_SECONDS)
        except FoundryError as error:
            if self.model is not None:
                log.warning("rollout server is gone", address=self.pod.address, error=error.message)
            self.model, self.error = None, error.message
            return
        found = ServedModel(
            answer.model_name,
            answer.model_fingerprint,
            answer.template_digest,
            answer.max_sequence_tokens,
            frozenset(answer.template.renders),
            frozenset(answer.template.variables),
            answer.template.tool_format,
        )
        if found != self.model:
            log.info("rollout server found", address=self.pod.address, model=found.name, fingerprint=found.fingerprint)
        self.model, self.error = found, ""

    @contextmanager
    def generating(self, request: rollout_pb2.GenerateRequest, deadline: float) -> Iterator[AsyncIterable[Chunk]]:
        """A call's chunks; leaving cancels the call. Raises FoundryError."""
        with self.calling(deadline) as (stub, timeout_seconds):
            call = stub.Generate(request, timeout=timeout_seconds)
            try:
                yield call
            finally:
                call.cancel()

    @contextmanager
    def calling(self, deadline: float) -> Iterator[tuple[rollout_pb2_grpc.RolloutAsyncStub, float]]:
        """For one call, and how many seconds it has. Raises FoundryError."""
        timeout_seconds = deadline - time.monotonic()
        if timeout_seconds <= 0:
            raise DeadlineExceeded("the request's time ran out before a rollout server took it")
        try:
            with self.pod.calling() as channel:
                yield rollout_pb2_grpc.RolloutStub(channel), timeout_seconds
        except Unavailable as error:
            # Its store being away says nothing about the server itself.
            if type(error) is Unavailable:
                self.model, self.error = None, error.message
            raise
        except (Unauthenticated, PermissionDenied) as error:
            # It is the gateway that was refused, not its caller, to whom such a server is one that is away.
            self.model, self.error = None, error.message
            raise Unavailable(f"{self.pod.name} refuses this gateway: {error.message}") from error


class RolloutBalancer:
    """All rollout servers; looks again every `poll_seconds`."""

    def __init__(self, pods: Pods, *, poll_seconds: float, retry_timeout_seconds: float) -> None:
        """`pods` are closed with it."""
        self._pods = pods
        self._poll_seconds = poll_seconds
        self._retry_timeout_seconds = retry_timeout_seconds
        self._servers: dict[str, RolloutServer] = {}
        self._last: ServedModel | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.refresh()
        self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        await end(*(task for task in (self._watcher, self._looking) if task is not None))
        await self._pods.close()

    def model(self) -> ServedModel:
        """What is served now, or was last: requests wait out a short absence.

        Raises Unavailable, FingerprintMismatch.
        """
        served = {address: server.model for address, server in sorted(self._servers.items()) if server.model}
        if len({model.fingerprint for model in served.values()}) > 1:
            found = ", ".join(f"{address}: {model.fingerprint}" for address, model in served.items())
            raise FingerprintMismatch(f"the rollout servers serve different models: {found}")
        self._last = next(iter(served.values()), self._last)
        if self._last is None:
            raise self._nobody()
        return self._last

    def num_reachable(self) -> int:
        return sum(server.model is not None for server in self._servers.values())

    async def generate(
        self,
        request: rollout_pb2.GenerateRequest,
        deliver: Callable[[Chunk], Awaitable[None]],
        *,
        deadline: float,
    ) -> None:
        """Hand each chunk of one request's answer to `deliver`. The server waits for as long as that takes; `deadline`
        is in `time.monotonic()`.

        An attempt that is Unavailable before its first chunk is repeated elsewhere, or in the same place a little
        later: it has had no effect. Raises FoundryError.
        """
        started = False

        async def attempt(server: RolloutServer) -> None:
            nonlocal started
            with server.generating(request, deadline) as chunks:
                async for chunk in chunks:
                    started = True
                    await deliver(decoded(chunk, server.pod.name))

        # Without a cartridge any server is as good as another.
        key = request.cartridges[0].digest if request.cartridges else request.request_id
        await self._repeated(key, deadline, attempt, lambda: started)

    async def ask(
        self, call: Callable[[rollout_pb2_grpc.RolloutAsyncStub, float], Awaitable[T]], *, deadline: float
    ) -> T:
        """What any server says to a call that has no effect; `call` gets its stub and the seconds that there are.

        `deadline` is as in `generate`. Raises FoundryError.
        """

        async def attempt(server: RolloutServer) -> T:
            with server.calling(deadline) as (stub, timeout_seconds):
                return await call(stub, timeout_seconds)

        return await self._repeated(secrets.token_hex(8), deadline, attempt, lambda: False)

    async def _repeated(
        self,
        key: str,
        deadline: float,
        attempt: Callable[[RolloutServer], Awaitable[T]],
        started: Callable[[], bool],
    ) -> T:
        give_up = min(deadline, time.monotonic() + self._retry_timeout_seconds)
        backoff_seconds = 0.05
        tried: set[str] = set()
        while True:
            try:
                return await attempt(self._pick(key, tried))
            except Unavailable:
                if started() or time.monotonic() + backoff_seconds > give_up:
                    raise
                metrics.ROLLOUT_RETRIES.inc()
            if all(server.model is None or address in tried for address, server in self._servers.items()):
                # Half to all of it at random, so that requests that failed together do not come back together.
                await asyncio.sleep(backoff_seconds * random.uniform(0.5, 1.0))
                backoff_seconds = min(1.0, 2 * backoff_seconds)
                tried.clear()
                await self.refresh()

    def _pick(self, key: str, tried: set[str]) -> RolloutServer:
        """The first in rendezvous order of `key` that is not above its share of the load."""
        servers = {
            address: server
            for address, server in self._servers.items()
            if server.model is not None and address not in tried
        }
        if not servers:
            raise self._nobody()
        num_in_flight = sum(server.pod.in_flight for server in servers.values())
        bound = math.ceil(_LOAD_FACTOR * (num_in_flight + 1) / len(servers))
        ordered = sorted(servers, key=lambda address: rendezvous(key, address), reverse=True)
        address = next(address for address in ordered if servers[address].pod.in_flight < bound)
        tried.add(address)
        return servers[address]

    def _nobody(self) -> Unavailable:
        reason = next((f" ({server.error})" for server in self._servers.values() if server.error), "")
        where = ", ".join(self._pods.addresses)
        return Unavailable(f"no rollout server answers at {where}{reason}", retry_after_seconds=1.0)

    async def refresh(self) -> None:
        """Look up the addresses and ask every server what it serves. Callers at the same time share one look."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        await asyncio.shield(self._looking)

    async def _look(self) -> None:
        pods = await self._pods.look()
        self._servers = {pod.address: self._servers.get(pod.address) or RolloutServer(pod) for pod in pods}
        await asyncio.gather(*(server.look() for server in self._servers.values()))
        metrics.ROLLOUTS_REACHABLE.set(self.num_reachable())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            await self.refresh()
