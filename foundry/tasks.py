"""Ending asyncio tasks, surely."""

from __future__ import annotations

import asyncio
from typing import Any

# Longer than what tasks do when they are cancelled.
_AGAIN_SECONDS = 5.0


async def end(*tasks: asyncio.Future[Any], again_seconds: float = _AGAIN_SECONDS) -> None:
    """Cancel the tasks and return when all have ended; what they raise is dropped.

    A cancellation can be lost: before Python 3.12 `asyncio.wait_for`, with which redis-py sends its commands, drops one
    that comes just as its work is done. A task that goes on after `again_seconds` is therefore cancelled again.
    """
    running = set(tasks)
    while running:
        for task in running:
            task.cancel()
        ended, running = await asyncio.wait(running, timeout=again_seconds)
        for task in ended:
            if not task.cancelled():
                # Else it would be reported as never looked at.
                task.exception()
