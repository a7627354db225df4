"""python -m services.teacher.main: parse, build, serve, close."""

from __future__ import annotations

import asyncio
import signal

import structlog
import torch

from foundry import telemetry
from foundry.model.lm import FrozenLM
from foundry.rpc.server import Server
from foundry.telemetry.gpu import observe_gpus
from foundry.v1 import teacher_pb2, teacher_pb2_grpc
from services.teacher.servicer import TeacherServicer
from services.teacher.settings import TeacherSettings

log = structlog.get_logger(__name__)


async def serve(settings: TeacherSettings) -> None:
    # Before the model is loaded, so that a port that is taken is known at once.
    service = teacher_pb2.DESCRIPTOR.services_by_name["Teacher"]
    server = Server(settings.listen, [service], settings.tls, access=settings.access, reflect=settings.reflection)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    lm = await asyncio.to_thread(FrozenLM.load, settings.model, device=settings.device, dtype=settings.dtype)
    observe_gpus()
    servicer = TeacherServicer(lm, settings)
    teacher_pb2_grpc.add_TeacherServicer_to_server(servicer, server.grpc)
    await server.start()
    await server.set_serving()
    log.info("serving", port=server.port, model_fingerprint=lm.spec.fingerprint)
    await stopping.wait()
    await server.stop(settings.grace_seconds)
    servicer.close()


def main() -> None:
    settings = TeacherSettings.parse()
    telemetry.start("teacher", settings)
    asyncio.run(serve(settings))


if __name__ == "__main__":
    main()
