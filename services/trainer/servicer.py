"""The Trainer service: control of the active run."""

from __future__ import annotations

from typing import Any

import grpc

from foundry.errors import NotFound
from foundry.store import RunStore
from foundry.v1 import trainer_pb2, trainer_pb2_grpc
from services.trainer.active import ActiveRun
from services.trainer.worker import Worker

Context = grpc.aio.ServicerContext[Any, Any]


class TrainerServicer(trainer_pb2_grpc.TrainerServicer):
    """Wishes go through the store, so that they outlive the worker; a checkpoint is asked of the worker itself."""

    def __init__(self, worker: Worker, runs: RunStore) -> None:
        self._worker = worker
        self._runs = runs

    async def Status(self, request: trainer_pb2.StatusRequest, context: Context) -> trainer_pb2.StatusResponse:
        answer = trainer_pb2.StatusResponse(model_fingerprint=self._worker.lm.spec.fingerprint)
        if (active := self._worker.active) is not None:
            answer.run_id = active.attempt.claimed.run_id
            answer.attempt = active.attempt.claimed.attempt
            answer.num_steps = active.attempt.spec.num_steps
            answer.step = active.run.progress.step if active.run is not None else 0
            answer.waiting_for = active.attempt.patience.waiting_for
            answer.state = active.state.value
        return answer

    async def Pause(self, request: trainer_pb2.PauseRequest, context: Context) -> trainer_pb2.PauseResponse:
        self._active(request.run_id).control.pause()
        await self._runs.request_pause(request.run_id)
        return trainer_pb2.PauseResponse()

    async def Resume(self, request: trainer_pb2.ResumeRequest, context: Context) -> trainer_pb2.ResumeResponse:
        self._active(request.run_id).control.resume()
        await self._runs.request_resume(request.run_id)
        return trainer_pb2.ResumeResponse()

    async def Checkpoint(
        self, request: trainer_pb2.CheckpointRequest, context: Context
    ) -> trainer_pb2.CheckpointResponse:
        step = await self._active(request.run_id).control.request_checkpoint()
        return trainer_pb2.CheckpointResponse(step=step)

    async def Stop(self, request: trainer_pb2.StopRequest, context: Context) -> trainer_pb2.StopResponse:
        self._active(request.run_id).control.cancel()
        await self._runs.request_cancel(request.run_id)
        return trainer_pb2.StopResponse()

    def _active(self, run_id: str) -> ActiveRun:
        active = self._worker.active
        if active is None or active.attempt.claimed.run_id != run_id:
            held = f"run {active.attempt.claimed.run_id}" if active is not None else "no run"
            raise NotFound(f"this worker holds {held}, not run {run_id or '(none)'}", field="run_id")
        return active
