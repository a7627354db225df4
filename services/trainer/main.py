"""python -m services.trainer.main: parse, build, work, close."""

from __future__ import annotations

import asyncio
import signal

import structlog
import torch

from foundry import telemetry
from foundry.lm import FrozenLM
from foundry.rpc.server import Server
from foundry.store import CartridgeStore, RunState
from foundry.telemetry.gpu import observe_gpus
from foundry.v1 import trainer_pb2, trainer_pb2_grpc
from services.trainer.servicer import TrainerServicer
from services.trainer.settings import TrainerSettings
from services.trainer.worker import Worker

log = structlog.get_logger(__name__)
# Of a process for one run, to whom a Job starts it: trying again does not help, and it does.
FAILED, STOPPED = 3, 128 + signal.SIGTERM


async def serve(settings: TrainerSettings) -> int:
    """The exit status."""
    # Before the model is loaded, so that a port that is taken is known at once.
    server = Server(settings.listen, [trainer_pb2.DESCRIPTOR.services_by_name["Trainer"]], settings.tls)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    lm = await asyncio.to_thread(FrozenLM.load, settings.model, device=settings.device, dtype=settings.dtype)
    observe_gpus()
    store = await CartridgeStore.open(settings.store)
    worker = Worker(lm, settings, store)
    trainer_pb2_grpc.add_TrainerServicer_to_server(TrainerServicer(worker, store.runs), server.grpc)
    await server.start()
    await server.set_serving()
    log.info("serving", port=server.port, model_fingerprint=lm.spec.fingerprint)
    working = asyncio.create_task(worker.work())
    stop = asyncio.create_task(stopping.wait())
    await asyncio.wait({working, stop}, return_when=asyncio.FIRST_COMPLETED)
    working.cancel()
    # A run in hand is given back before the store is closed.
    await asyncio.wait({working})
    await server.stop(settings.grace_seconds)
    await store.close()
    if settings.run and worker.ended is not None:
        return FAILED if worker.ended is RunState.FAILED else 0
    if working.cancelled():
        return STOPPED if settings.run else 0
    working.result()
    return 0


def main() -> None:
    settings = TrainerSettings.parse()
    telemetry.start("trainer", settings)
    raise SystemExit(asyncio.run(serve(settings)))


if __name__ == "__main__":
    main()
