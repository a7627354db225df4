"""What the process of every rank is built of: a port, the model, its place in the group; and all of a follower's."""

from __future__ import annotations

import asyncio

import structlog
import torch

from foundry.model.lm import FrozenLM
from foundry.rpc.server import Server
from foundry.telemetry.gpu import observe_gpus
from services.trainer.ranks.follower import follow
from services.trainer.ranks.group import Group, Rank
from services.trainer.settings import TrainerSettings

log = structlog.get_logger(__name__)


def listen(settings: TrainerSettings) -> Server:
    """Answers for the process's health alone. Raises PortTaken."""
    return Server(settings.listen, [], settings.tls, reflect=settings.reflection)


async def load_model(settings: TrainerSettings) -> FrozenLM:
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    lm = await asyncio.to_thread(FrozenLM.load, settings.model, device=settings.device, dtype=settings.dtype)
    observe_gpus()
    return lm


async def join_group(settings: TrainerSettings, rank: Rank, lm: FrozenLM) -> Group:
    """Returns when all ranks are there. Raises RankLost."""
    return await asyncio.to_thread(Group, rank, lm.device, settings.rank_timeout_seconds)


async def serve_follower(settings: TrainerSettings, rank: Rank) -> int:
    """Answer for the rank's health and do as rank 0 says. Returns the exit status. Raises RankLost."""
    # On a machine without rank 0 the first of its ranks answers for their health.
    server = listen(settings) if rank.local_rank == 0 else None
    lm = await load_model(settings)
    group = await join_group(settings, rank, lm)
    try:
        if server is not None:
            await server.start()
            await server.set_serving()
        log.info("following", model_fingerprint=lm.spec.fingerprint)
        return await asyncio.to_thread(follow, lm, group)
    finally:
        if server is not None:
            await server.stop(0)
