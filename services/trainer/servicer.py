"""The Trainer service: control of the run in hand."""

from __future__ import annotations

from typing import Any

import grpc

from foundry.errors import NotFound
from foundry.store import RunStore
from foundry.v1 import trainer_pb2, trainer_pb2_grpc
from services.trainer.worker import Hand, Worker

Context = grpc.aio.ServicerContext[Any, Any]


class TrainerServicer(trainer_pb2_grpc.TrainerServicer):
    """Wishes go through the store, so that they outlive the worker; a checkpoint is asked of the worker itself."""

    def __init__(self, worker: Worker, runs: RunStore) -> None:
        self._worker = worker
        self._runs = runs

    async def Status(self, request: trainer_pb2.StatusRequest, context: Context) -> trainer_pb2.StatusResponse:
        answer = trainer_pb2.StatusResponse(model_fingerprint=self._worker.lm.spec.fingerprint)
        if (hand := self._worker.hand) is not None:
            answer.run_id = hand.claimed.run_id
            answer.attempt = hand.claimed.attempt
            answer.num_steps = hand.claimed.spec.num_steps
            answer.step = hand.step
            answer.waiting_for = hand.patience.waiting_for
            answer.state = hand.state.value
        return answer

    async def Pause(self, request: trainer_pb2.PauseRequest, context: Context) -> trainer_pb2.PauseResponse:
        self._hand(request.run_id).control.pause()
        await self._runs.request_pause(request.run_id)
        return trainer_pb2.PauseResponse()

    async def Resume(self, request: trainer_pb2.ResumeRequest, context: Context) -> trainer_pb2.ResumeResponse:
        self._hand(request.run_id).control.resume()
        await self._runs.request_resume(request.run_id)
        return trainer_pb2.ResumeResponse()

    async def Checkpoint(
        self, request: trainer_pb2.CheckpointRequest, context: Context
    ) -> trainer_pb2.CheckpointResponse:
        step = await self._hand(request.run_id).control.request_checkpoint()
        return trainer_pb2.CheckpointResponse(step=step)

    async def Stop(self, request: trainer_pb2.StopRequest, context: Context) -> trainer_pb2.StopResponse:
        self._hand(request.run_id).control.cancel()
        await self._runs.request_cancel(request.run_id)
        return trainer_pb2.StopResponse()

    def _hand(self, run_id: str) -> Hand:
        hand = self._worker.hand
        if hand is None or hand.claimed.run_id != run_id:
            held = f"run {hand.claimed.run_id}" if hand is not None else "no run"
            raise NotFound(f"this worker holds {held}, not run {run_id or '(none)'}", field="run_id")
        return hand
