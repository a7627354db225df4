"""The process of a rank that follows: it answers for its health, and does as rank 0 says."""

from __future__ import annotations

import asyncio

import structlog

from services.trainer.parts import join, listen, load
from services.trainer.ranks.follower import follow
from services.trainer.ranks.group import Seat
from services.trainer.settings import TrainerSettings

log = structlog.get_logger(__name__)


async def accompany(settings: TrainerSettings, seat: Seat) -> int:
    """The exit status. Raises RankLost."""
    # On a machine without rank 0 the first of its ranks answers for their health.
    server = listen(settings) if seat.local_rank == 0 else None
    lm = await load(settings)
    group = await join(settings, seat, lm)
    try:
        if server is not None:
            await server.start()
            await server.set_serving()
        log.info("following", model_fingerprint=lm.spec.fingerprint)
        return await asyncio.to_thread(follow, lm, group)
    finally:
        if server is not None:
            await server.stop(0)
