"""Pause, resume, cancel: what others want of the active run."""

from __future__ import annotations


class Control:
    """Wishes are set from outside at any time and honoured by the run between two steps."""

    def __init__(self) -> None:
        self.cancelled = self.paused = False

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def cancel(self) -> None:
        self.cancelled = True

    async def goes_on(self) -> bool:
        """Whether another step is wanted. Awaited, so that whoever steers a run may do something between two steps."""
        return not self.cancelled and not self.paused
