"""What every rank of a trainer is built of: a port, the model, its place in the group."""

from __future__ import annotations

import asyncio

import torch

from foundry.model.lm import FrozenLM
from foundry.rpc.server import Server
from foundry.telemetry.gpu import observe_gpus
from services.trainer.ranks.group import Group, Seat
from services.trainer.settings import TrainerSettings


def listen(settings: TrainerSettings) -> Server:
    """Answers for the process's health alone. Raises PortTaken."""
    return Server(settings.listen, [], settings.tls)


async def load(settings: TrainerSettings) -> FrozenLM:
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    lm = await asyncio.to_thread(FrozenLM.load, settings.model, device=settings.device, dtype=settings.dtype)
    observe_gpus()
    return lm


async def join(settings: TrainerSettings, seat: Seat, lm: FrozenLM) -> Group:
    """Returns when all ranks are there. Raises RankLost."""
    return await asyncio.to_thread(Group, seat, lm.device, settings.rank_timeout_seconds)
