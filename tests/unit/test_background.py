"""What goes on beside the steps: one thing at a time, and its failure is the run's."""

from __future__ import annotations

import asyncio

import pytest

from foundry.errors import StoreRefused
from services.trainer.background import Background


async def test_one_thing_at_a_time_in_order() -> None:
    background, may_end, said = Background(), asyncio.Event(), list[str]()

    async def first() -> None:
        await may_end.wait()
        said.append("first")

    async def second() -> None:
        said.append("second")

    await background.start(first())
    background.check()
    starting = asyncio.create_task(background.start(second()))
    await asyncio.sleep(0)
    assert not starting.done()
    may_end.set()
    await starting
    await background.settle()
    assert said == ["first", "second"]


async def test_its_failure_is_raised_at_whatever_is_asked_next() -> None:
    async def fail() -> None:
        raise StoreRefused("no such bucket")

    async def never() -> None:
        raise AssertionError

    background = Background()
    await background.start(fail())
    with pytest.raises(StoreRefused):
        await background.settle()
    with pytest.raises(StoreRefused):
        background.check()
    with pytest.raises(StoreRefused):
        await background.start(never())
    await background.close()


async def test_it_ends_with_the_run() -> None:
    background, ended = Background(), asyncio.Event()

    async def go_on() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    await background.start(go_on())
    await asyncio.sleep(0)
    await background.close()
    assert ended.is_set()
