"""What goes on beside a run's steps, one thing at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from foundry.tasks import end


class Background:
    """What fails in it fails whoever asks next."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    async def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Once what was started before has ended."""
        try:
            await self.settle()
        except BaseException:
            work.close()
            raise
        self._task = asyncio.create_task(work)

    def check(self) -> None:
        """Raise what it has failed with, if it has."""
        if self._task is not None and self._task.done():
            self._task.result()

    async def settle(self) -> None:
        if self._task is not None:
            await self._task

    async def close(self) -> None:
        """Cancel it."""
        if self._task is not None:
            await end(self._task)
