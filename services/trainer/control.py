"""Pause, resume, cancel: what others want of the active run."""

from __future__ import annotations

import asyncio


class Control:
    """Wishes are set from outside at any time and honoured by the run between two steps."""

    def __init__(self) -> None:
        self.cancelled = False
        self._may_run = asyncio.Event()
        self._may_run.set()

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
