"""python -m services.trainer.main: parse, build, work, close. Under torchrun rank 0 works and the others follow it."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress

import structlog

from foundry import telemetry
from foundry.errors import RankLost
from foundry.store import CartridgeStore, RunState
from services.trainer.exits import FAILED, RANK_LOST, STOPPED
from services.trainer.parts import join, listen, load
from services.trainer.ranks.accompany import accompany
from services.trainer.ranks.group import Seat
from services.trainer.ranks.leader import Leader
from services.trainer.settings import TrainerSettings
from services.trainer.worker import Worker

log = structlog.get_logger(__name__)


async def serve(settings: TrainerSettings, seat: Seat) -> int:
    """The exit status. Raises RankLost."""
    # Before the model is loaded, so that a port that is taken is known at once.
    server = listen(settings)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    lm = await load(settings)
    store = await CartridgeStore.open(settings.store)
    leader = Leader(await join(settings, seat, lm)) if seat.num_ranks > 1 else None
    worker = Worker(lm, settings, store, leader)
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
