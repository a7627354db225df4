"""python -m services.trainer.main: parse, build, work, close. Under torchrun rank 0 works and the others follow it."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress

import structlog

from foundry import telemetry
from foundry.errors import RankLost
from foundry.store import CartridgeStore
from services.trainer.exits import RANK_LOST, STOPPED
from services.trainer.ranks.group import Rank
from services.trainer.ranks.leader import Leader
from services.trainer.ranks.process import join_group, listen, load_model, serve_follower
from services.trainer.settings import TrainerSettings
from services.trainer.worker import Worker

log = structlog.get_logger(__name__)


async def serve(settings: TrainerSettings, rank: Rank) -> int:
    """The exit status. Raises RankLost."""
    # Before the model is loaded, so that a port that is taken, or a token that can't be read, is known at once.
    server = listen(settings)
    settings.token_of("trainer")
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    lm = await load_model(settings)
    store = await CartridgeStore.open(settings.store)
    leader = Leader(await join_group(settings, rank, lm)) if rank.num_ranks > 1 else None
    worker = Worker(lm, settings, store, leader)
    await server.start()
    await server.set_serving()
    log.info("serving", port=server.port, model_fingerprint=lm.spec.fingerprint)
    try:
        status = await worker.work_until(stopping)
    finally:
        await server.stop(settings.grace_seconds)
        await store.close()
    if leader is not None and status != STOPPED:
        # At the very end: a pod whose followers have ended well is not started again with the one of rank 0.
        with suppress(RankLost):
            await asyncio.to_thread(leader.end, status)
    return status if settings.run else 0


def main() -> None:
    rank, settings = Rank.of_process(), TrainerSettings.parse()
    # One endpoint of metrics on each machine.
    metrics_port = settings.metrics_port if rank.local_rank == 0 else 0
    settings = settings.model_copy(update={"device": rank.device(settings.device), "metrics_port": metrics_port})
    telemetry.start("trainer", settings)
    if rank.num_ranks > 1:
        structlog.contextvars.bind_contextvars(rank=rank.rank)
    try:
        status = asyncio.run(serve(settings, rank) if rank.leads else serve_follower(settings, rank))
    except RankLost as error:
        log.error("rank lost", error=error.message)
        status = RANK_LOST
    raise SystemExit(status)


if __name__ == "__main__":
    main()
