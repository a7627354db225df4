"""The real rollout and teacher servers in this process, each reached through a link that can be cut and damaged.

Everything below the servicers is real. Two things are added: the engine tells the observer what it decodes, and a
call may be tampered with between the servicer and the wire, once for each fault that is armed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from foundry.model.lm import FrozenLM
from foundry.rpc.server import Server
from foundry.store import CartridgeStore, StoreSettings
from foundry.v1 import rollout_pb2, rollout_pb2_grpc, teacher_pb2, teacher_pb2_grpc
from services.rollout.engine import SequenceRequest, TokenOutput
from services.rollout.engine.torch.engine import TorchEngine
from services.rollout.servicer import RolloutServicer
from services.rollout.serving import Serving, torch_engine
from services.rollout.settings import RolloutSettings
from services.teacher.servicer import TeacherServicer
from services.teacher.settings import TeacherSettings
from tests.chaos.faults.fault import Fault
from tests.chaos.faults.link import Link
from tests.chaos.faults.observer import Observer

MAX_SEQUENCES = 8
MAX_SEQUENCE_TOKENS = 96

# The servicer's own answer to a request.
Answer = Callable[[Any], AsyncIterator[Any]]


@dataclass(frozen=True)
class Call:
    """One call on its way: what came, who would answer it, and on which server."""

    request: Any
    answer: Answer
    server: _Host


Tamper = Callable[[Call], AsyncIterator[Any]]


class CallSeam:
    """Tampers with one call for each fault that is armed, whichever server it reaches."""

    def __init__(self) -> None:
        self._armed: list[tuple[Fault, Tamper]] = []

    def arm(self, fault: Fault, tamper: Tamper) -> None:
        self._armed.append((fault, tamper))

    def disarm(self) -> None:
        self._armed.clear()

    def take(self) -> Tamper | None:
        if not self._armed:
            return None
        fault, tamper = self._armed.pop(0)
        fault.fired = True
        return tamper


def observed_engine(observer: Observer) -> type[TorchEngine]:
    """The built-in engine, with the observer at its admission and at its exit."""

    class ObservedEngine(TorchEngine):
        def admit(self, requests: Mapping[int, SequenceRequest]) -> None:
            super().admit(requests)
            for sequence_id, request in requests.items():
                for digest in request.digests:
                    observer.admitted(digest, self._cartridges[digest].kv_L2GPD)
                self.__open()[sequence_id] = (request, [])

        def step(self) -> list[TokenOutput]:
            outputs = super().step()
            for output in outputs:
                request, so_far = self.__open()[output.sequence_id]
                so_far.append(output)
                if output.finish_reason is not None:
                    observer.decoded(request, so_far)
            return outputs

        def __open(self) -> dict[int, tuple[SequenceRequest, list[TokenOutput]]]:
            found: dict[int, tuple[SequenceRequest, list[TokenOutput]]] = self.__dict__.setdefault("_observed", {})
            return found

    return ObservedEngine


class _Host:
    """A server behind a link whose address stays; a restarted one is a new process in all but name."""

    def __init__(self, seam: CallSeam) -> None:
        self.seam = seam
        self.link = Link(("127.0.0.1", 1))
        self._restarting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.link.start()
        await self._begin()

    def restart_soon(self) -> None:
        """Die now, with all calls in flight, and come back."""
        if self._restarting is None or self._restarting.done():
            self._restarting = asyncio.create_task(self._restart())

    async def close(self) -> None:
        if self._restarting is not None:
            await self._restarting
        await self._end()
        await self.link.close()

    async def _restart(self) -> None:
        await self._end()
        await self._begin()

    async def _begin(self) -> None:
        raise NotImplementedError

    async def _end(self) -> None:
        raise NotImplementedError


class RolloutHost(_Host):
    """One rollout server with a store of its own."""

    def __init__(
        self,
        lm: FrozenLM,
        model: Path,
        open_store: Callable[[], Awaitable[CartridgeStore]],
        settings: StoreSettings,
        seam: CallSeam,
        observer: Observer,
        *,
        budget_bytes: int,
    ) -> None:
        super().__init__(seam)
        self._lm, self._open_store, self._observer = lm, open_store, observer
        self._settings = RolloutSettings(
            model=model,
            store=settings,
            max_sequences=MAX_SEQUENCES,
            max_sequence_tokens=MAX_SEQUENCE_TOKENS,
            cartridge_budget_bytes=budget_bytes,
        )

    def evict(self) -> int:
        """Unload all that is not in use; returns how many were."""
        device = self.parts.residency.device
        idle = [resident.digest for resident in device.residents() if not resident.references]
        for digest in idle:
            device.remove(digest)
        return len(idle)

    async def _begin(self) -> None:
        self._store = await self._open_store()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("services.rollout.serving.TorchEngine", observed_engine(self._observer))
            self.parts = Serving.build(
                self._settings, self._lm.info, torch_engine(self._settings, self._lm), self._store
            )
        self.parts.driver.start()
        self._server = Server("127.0.0.1:0", [rollout_pb2.DESCRIPTOR.services_by_name["Rollout"]])
        servicer = _Rollout(self, self._server)
        servicer.begin(self.parts)
        rollout_pb2_grpc.add_RolloutServicer_to_server(servicer, self._server.grpc)
        await self._server.start()
        self.link.upstream = ("127.0.0.1", self._server.port)

    async def _end(self) -> None:
        await self._server.stop(0)
        await self.parts.residency.close()
        await self.parts.driver.close()
        await self._store.close()


class _Rollout(RolloutServicer):
    def __init__(self, host: RolloutHost, server: Server) -> None:
        super().__init__(server.set_not_serving)
        self._host = host

    async def GenerateBatch(
        self, request: rollout_pb2.GenerateBatchRequest, context: Any
    ) -> AsyncIterator[rollout_pb2.GenerateBatchResponse]:
        tamper = self._host.seam.take()
        generate_batch = super().GenerateBatch
        answers = (
            generate_batch(request, context)
            if tamper is None
            else tamper(Call(request, lambda asked: generate_batch(asked, context), self._host))
        )
        async for answer in answers:
            yield answer


class TeacherHost(_Host):
    """The teacher server."""

    def __init__(self, lm: FrozenLM, model: Path, seam: CallSeam) -> None:
        super().__init__(seam)
        self._lm = lm
        self._settings = TeacherSettings(model=model)

    async def _begin(self) -> None:
        self._servicer = _Teacher(self._lm, self._settings, self)
        self._server = Server("127.0.0.1:0", [teacher_pb2.DESCRIPTOR.services_by_name["Teacher"]])
        teacher_pb2_grpc.add_TeacherServicer_to_server(self._servicer, self._server.grpc)
        await self._server.start()
        self.link.upstream = ("127.0.0.1", self._server.port)

    async def _end(self) -> None:
        await self._server.stop(0)
        self._servicer.close()


class _Teacher(TeacherServicer):
    def __init__(self, lm: FrozenLM, settings: TeacherSettings, host: TeacherHost) -> None:
        super().__init__(lm, settings)
        self._host = host

    async def Score(self, request: teacher_pb2.ScoreRequest, context: Any) -> AsyncIterator[teacher_pb2.ScoreResponse]:
        tamper = self._host.seam.take()
        score = super().Score
        responses = (
            score(request, context)
            if tamper is None
            else tamper(Call(request, lambda asked: score(asked, context), self._host))
        )
        async for response in responses:
            yield response
