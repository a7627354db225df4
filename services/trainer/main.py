"""python -m services.trainer.main: parse, build, work, close. Under torchrun rank 0 works and the others follow it."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress

import structlog
import torch

from foundry import telemetry
from foundry.errors import RankLost
from foundry.lm import FrozenLM
from foundry.rpc.server import Server
from foundry.store import CartridgeStore, RunState
from foundry.telemetry.gpu import observe_gpus
from foundry.v1 import trainer_pb2, trainer_pb2_grpc
from services.trainer.exits import FAILED, RANK_LOST, STOPPED
from services.trainer.follower import follow
from services.trainer.group import Group, Seat
from services.trainer.ranks import Leader
from services.trainer.servicer import TrainerServicer
from services.trainer.settings import TrainerSettings
from services.trainer.worker import Worker

log = structlog.get_logger(__name__)


async def serve(settings: TrainerSettings, seat: Seat) -> int:
    """The exit status. Raises RankLost."""
    # Before the model is loaded, so that a port that is taken is known at once.
    server = _server(settings)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    lm = await _load(settings)
    store = await CartridgeStore.open(settings.store)
    leader = Leader(await _join(settings, seat, lm)) if seat.num_ranks > 1 else None
    worker = Worker(lm, settings, store, leader)
    trainer_pb2_grpc.add_TrainerServicer_to_server(TrainerServicer(worker, store.runs), server.grpc)
    await server.start()
    await server.set_serving()
    log.info("serving", port=server.port, model_fingerprint=lm.spec.fingerprint)
    working = asyncio.create_task(worker.work())
    stop = asyncio.create_task(stopping.wait())
    beating = {asyncio.create_task(leader.beat())} if leader is not None else set()
    ended, _ = await asyncio.wait({working, stop} | beating, return_when=asyncio.FIRST_COMPLETED)
    working.cancel()
    # A run in hand is given back before the store is closed.
    await asyncio.wait({working})
    await server.stop(settings.grace_seconds)
    await store.close()
    if settings.run and worker.ended is not None:
        status = FAILED if worker.ended is RunState.FAILED else 0
    elif stopping.is_set() and working.cancelled():
        return STOPPED if settings.run else 0
    else:
        for task in beating & ended:
            task.result()
        working.result()
        status = 0
    if leader is not None:
        # At the very end: a pod whose followers have ended well is not started again with the one of rank 0.
        with suppress(RankLost):
            await asyncio.to_thread(leader.end, status)
    return status


async def accompany(settings: TrainerSettings, seat: Seat) -> int:
    """The exit status of a rank that follows. Raises RankLost."""
    # On a machine without rank 0 the first of its ranks answers for their health.
    server = _server(settings) if seat.local_rank == 0 else None
    lm = await _load(settings)
    group = await _join(settings, seat, lm)
    try:
        if server is not None:
            await server.start()
            await server.set_serving()
        log.info("following", model_fingerprint=lm.spec.fingerprint)
        return await asyncio.to_thread(follow, lm, group)
    finally:
        if server is not None:
            await server.stop(0)


def _server(settings: TrainerSettings) -> Server:
    return Server(settings.listen, [trainer_pb2.DESCRIPTOR.services_by_name["Trainer"]], settings.tls)


async def _load(settings: TrainerSettings) -> FrozenLM:
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    lm = await asyncio.to_thread(FrozenLM.load, settings.model, device=settings.device, dtype=settings.dtype)
    observe_gpus()
    return lm


async def _join(settings: TrainerSettings, seat: Seat, lm: FrozenLM) -> Group:
    return await asyncio.to_thread(Group, seat, lm.device, settings.rank_timeout_seconds)


def main() -> None:
    seat, settings = Seat.of_process(), TrainerSettings.parse()
    # One endpoint of metrics on each machine.
    metrics_port = settings.metrics_port if seat.local_rank == 0 else 0
    settings = settings.model_copy(update={"device": seat.device(settings.device), "metrics_port": metrics_port})
    telemetry.start("trainer", settings)
    if seat.num_ranks > 1:
        structlog.contextvars.bind_contextvars(rank=seat.rank)
    try:
        status = asyncio.run(serve(settings, seat) if seat.leads else accompany(settings, seat))
    except RankLost as error:
        log.error("rank lost", error=error.message)
        status = RANK_LOST
    raise SystemExit(status)


if __name__ == "__main__":
    main()
