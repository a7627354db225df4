"""Tasks end, whatever becomes of a cancellation."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from foundry.tasks import end


async def test_a_task_that_loses_a_cancellation_is_cancelled_again() -> None:
    async def hard_of_hearing() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    task = asyncio.create_task(hard_of_hearing())
    await asyncio.sleep(0)
    await end(task, again_seconds=0.01)
    assert task.cancelled()


async def test_what_is_over_or_ends_badly_is_no_matter() -> None:
    async def over() -> int:
        return 1

    async def bad() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("while it was being cancelled")

    tasks = [asyncio.create_task(over()), asyncio.create_task(bad())]
    await asyncio.sleep(0)
    await end(*tasks)
    assert all(task.done() for task in tasks)
    await end()
