"""A rollout server that says what a faulty one might: the real one can't be made to lie."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from foundry.errors import Unavailable
from foundry.identity import answer_checksum
from foundry.rpc.access import Access
from foundry.rpc.server import Server
from foundry.store import CartridgeId
from foundry.v1 import common_pb2, rollout_pb2, rollout_pb2_grpc

POLICY = CartridgeId("name", 7, "blake3:" + "7" * 64)


class Scripted(rollout_pb2_grpc.RolloutServicer):
    def __init__(self) -> None:
        self.max_sequences = 64
        self.changes: dict[str, Any] = {}
        self.leave_out = False
        # Set: every call is refused, once this is set.
        self.refuses: asyncio.Event | None = None
        self.asked = asyncio.Event()
        # Set: answers don't come until the call is cancelled.
        self.cancelled: asyncio.Event | None = None
        self.requests: list[rollout_pb2.GenerateRequest] = []
        # How many each call had.
        self.calls: list[int] = []

    async def Resident(self, request: object, context: object) -> rollout_pb2.ResidentResponse:
        return rollout_pb2.ResidentResponse(max_sequences=self.max_sequences)

    async def GenerateBatch(
        self, request: rollout_pb2.GenerateBatchRequest, context: object
    ) -> AsyncIterator[rollout_pb2.GenerateBatchResponse]:
        self.requests += request.requests
        self.calls.append(len(request.requests))
        self.asked.set()
        if self.refuses is not None:
            await self.refuses.wait()
            raise Unavailable("going away")
        if self.cancelled is not None:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        # In reverse: completions come in the order in which they end.
        for index in reversed(range(len(request.requests) - self.leave_out)):
            asked = request.requests[index]
            completion = rollout_pb2.Completion(
                ids=[asked.token_ids.ids[0], 2],
                logprobs=[-0.5, -0.25],
                finish_reason=rollout_pb2.FINISH_REASON_STOP,
                identity=common_pb2.Identity(
                    model_fingerprint="blake3:model", template_digest="blake3:template", cartridges=asked.cartridges
                ),
            )
            completion.checksum = answer_checksum(asked.token_ids.ids, completion.ids, completion.logprobs)
            for name, value in self.changes.items():
                value(completion) if callable(value) else setattr(completion, name, value)
            yield rollout_pb2.GenerateBatchResponse(request_index=index, completion=completion)


@asynccontextmanager
async def serving(
    servicer: rollout_pb2_grpc.RolloutServicer, address: str = "127.0.0.1:0", *, access: Access | None = None
) -> AsyncIterator[Server]:
    """Ends with all calls in flight, as a server that is killed."""
    server = Server(address, [rollout_pb2.DESCRIPTOR.services_by_name["Rollout"]], access=access)
    rollout_pb2_grpc.add_RolloutServicer_to_server(servicer, server.grpc)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)
