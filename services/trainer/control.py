"""Pause, resume, cancel, checkpoint-now: what others want of the active run."""

from __future__ import annotations

import asyncio

from foundry.errors import Unavailable


class Control:
    """Wishes are set from outside at any time and honoured by the run between two steps."""

    def __init__(self) -> None:
        self.cancelled = False
        self._may_run = asyncio.Event()
        self._may_run.set()
        self._checkpoints: list[asyncio.Future[int]] = []

    @property
    def paused(self) -> bool:
        return not self._may_run.is_set()

    def pause(self) -> None:
        self._may_run.clear()

    def resume(self) -> None:
        self._may_run.set()

    def cancel(self) -> None:
        self.cancelled = True
        self._may_run.set()

    async def wait_until_running(self) -> None:
        await self._may_run.wait()

    def request_checkpoint(self) -> asyncio.Future[int]:
        """Resolves to the step of the checkpoint that was written for it."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._checkpoints.append(future)
        return future

    @property
    def wants_checkpoint(self) -> bool:
        return bool(self._checkpoints)

    def checkpointed(self, step: int) -> None:
        for future in self._checkpoints:
            if not future.done():
                future.set_result(step)
        self._checkpoints.clear()

    def end(self) -> None:
        """The run is over: no checkpoint will come."""
        for future in self._checkpoints:
            if not future.done():
                future.set_exception(Unavailable("the run ended before the checkpoint was written"))
        self._checkpoints.clear()
