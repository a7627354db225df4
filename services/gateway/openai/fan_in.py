"""Many sources, one reader."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Generic, Self, TypeVar

from foundry.tasks import end

T = TypeVar("T")
Deliver = Callable[[T], Awaitable[None]]
Source = Callable[[Deliver[T]], Coroutine[Any, Any, None]]

# More would only be held here instead of where they come from.
_MAX_WAITING = 16


class FanIn(Generic[T]):
    """What several sources deliver, in the order in which it comes. Delivering waits while the reader is behind.

    Use as an async context manager: leaving it cancels the sources.
    """

    def __init__(self, sources: Sequence[Source[T]]) -> None:
        self._sources = sources
        # Items with their source's number; None or what it raised when a source has ended.
        self._queue: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue(_MAX_WAITING)
        self._tasks: list[asyncio.Task[None]] = []
        self._num_running = len(sources)
        self._left = False

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._run(index, source)) for index, source in enumerate(self._sources)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._left = True
        await end(*self._tasks)

    async def next(self) -> tuple[int, T] | None:
        """The next item and its source's number; None when all sources have ended. Raises what a source raised."""
        while self._num_running:
            item = await self._queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is not None:
                return item
            self._num_running -= 1
        return None

    async def _run(self, index: int, source: Source[T]) -> None:
        end: BaseException | None = None
        try:
            await source(lambda item: self._queue.put((index, item)))
        except (Exception, asyncio.CancelledError) as error:
            # One that waits for a task which somebody else cancelled ends so too: its reader must not wait for ever.
            if self._left:
                raise
            end = error
        await self._queue.put(end)
