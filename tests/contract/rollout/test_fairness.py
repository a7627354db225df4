"""Callers beside each other: who gets a place when, and what those are told for whom there is none in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from foundry.errors import ResourceExhausted, Unavailable
from foundry.model.lm import FrozenLM
from foundry.rpc.channel import typed_errors
from foundry.v1 import common_pb2, rollout_pb2
from services.rollout.driver import Submission
from services.rollout.engine import SequenceRequest
from tests.contract.rollout.server import TIMEOUT_SECONDS, Gate, Rollout, joined, long, serving

LONG = 250


class Asking:
    """Calls in the order in which they are made, and which sequences the engine was handed: client and seed."""

    def __init__(self, rollout: Rollout) -> None:
        self._rollout = rollout
        self.handed: list[str] = []
        engine = rollout.parts.driver._engine
        admit = engine.admit

        def noting_admit(requests: Mapping[int, SequenceRequest]) -> None:
            self.handed += [f"{each.tenant}{each.sampling.seed}" for each in requests.values()]
            admit(requests)

        engine.admit = noting_admit

    async def ask(self, name: str, seed: int, n: int = 1, tokens: int = 4) -> tuple[Any, Submission]:
        caller = common_pb2.Caller(tenant=name, client=name)
        sampling = {"max_new_tokens": tokens, "seed": seed, "n": n}
        call = self._rollout.stub.Generate(
            self._rollout.request(sampling=sampling, caller=caller), timeout=TIMEOUT_SECONDS
        )
        return call, await self._rollout.submitted.get()


async def test_a_short_question_is_answered_beside_a_long_queue(lm: FrozenLM, directory: Path) -> None:
    gate = Gate()
    async with serving(lm, directory, gate, max_sequences=4) as rollout:
        asking = Asking(rollout)
        for _ in range(3):
            _, submission = await asking.ask("us", 1)
            gate.allow(4)
            await submission.ended
        hog, hogs = await asking.ask("hog", 100, n=10, tokens=LONG)
        gate.allow(1)
        await hog.read()
        # It leaves us the place that we had, each time, and one for who comes anew.
        for _ in range(3):
            call, _ = await asking.ask("us", 2)
            gate.allow(5)
            assert len(joined([chunk async for chunk in call])[0]) == 4
        assert asking.handed == ["us1"] * 3 + ["hog100", "hog101"] + ["us2"] * 3
        assert hogs.num_open == 10
        hog.cancel()
        gate.open()
        await hogs.ended


async def test_clients_take_turns_then_their_calls(lm: FrozenLM, directory: Path) -> None:
    gate = Gate()
    async with serving(lm, directory, gate, max_sequences=1) as rollout:
        asking = Asking(rollout)
        first, _ = await asking.ask("x", 1)
        asked = [await asking.ask(*each) for each in (("a", 10, 2), ("a", 20, 2), ("b", 30, 3))]
        gate.open()
        await asyncio.gather(*(submission.ended for _, submission in asked))
        assert asking.handed == ["x1", "a10", "b30", "a20", "b31", "a11", "b32", "a21"]
        for call in (first, *(call for call, _ in asked)):
            assert [chunk async for chunk in call][-1].HasField("usage")


async def test_a_batch_alone_is_handed_over_at_once_whoever_was_there_before(lm: FrozenLM, directory: Path) -> None:
    async with serving(lm, directory, max_sequences=4) as rollout:
        asking = Asking(rollout)
        together = [await asking.ask(name, 1) for name in "abcd"]
        await asyncio.gather(*(submission.ended for _, submission in together))
        del asking.handed[:]
        requests = [
            rollout.request(sampling={"seed": seed}, skip_prefix_cache=True, caller=common_pb2.Caller(client="run"))
            for seed in range(12)
        ]
        await rollout.batch(requests)
        assert asking.handed == [str(seed) for seed in range(12)]


async def test_no_step_is_taken_with_a_free_place_and_somebody_waiting(lm: FrozenLM, directory: Path) -> None:
    async with serving(lm, directory, max_sequences=4) as rollout:
        engine, driver = rollout.parts.driver._engine, rollout.parts.driver
        step, idle = engine.step, []

        def noting_step() -> Any:
            stats = engine.stats()
            idle.append(driver._queue.num_waiting and stats.num_running + stats.num_waiting < 4)
            return step()

        engine.step = noting_step
        await rollout.batch([rollout.request(sampling={"max_new_tokens": 2 + seed % 5}) for seed in range(16)])
        assert len(idle) > 10
        assert not any(idle)


async def test_a_client_with_nothing_here_is_not_kept_out_by_those_that_fill_the_queue(
    lm: FrozenLM, directory: Path
) -> None:
    """A run's batch is as large as the server takes, and would else find room on an idle one only."""
    gate = Gate()
    async with serving(lm, directory, gate, max_sequences=1, max_waiting=3) as rollout:
        hog, _ = await Asking(rollout).ask("hog", 1, n=4)
        with pytest.raises(ResourceExhausted, match="4 sequences run or wait, of at most 4"):
            await rollout.generate(rollout.request(caller=common_pb2.Caller(tenant="hog", client="hog")))
        batch = asyncio.create_task(rollout.batch([rollout.request(caller=common_pb2.Caller(client="run"))] * 4))
        await rollout.submitted.get()
        with pytest.raises(ResourceExhausted, match="of at most 8"):
            await rollout.generate(rollout.request(caller=common_pb2.Caller(client="third")))
        gate.open()
        assert len(await batch) == 4
        assert [chunk async for chunk in hog][-1].HasField("usage")


async def test_who_would_wait_too_long_is_refused_at_once(lm: FrozenLM, directory: Path) -> None:
    gate = Gate()
    async with serving(lm, directory, gate, max_sequences=1, max_queue_seconds=0.05) as rollout:
        # So that it is known how long steps and answers take.
        gate.allow(250)
        await rollout.generate(long(rollout))
        call = rollout.stub.Generate(long(rollout), timeout=TIMEOUT_SECONDS)
        gate.allow(1)
        await call.read()
        with pytest.raises(ResourceExhausted, match="would wait") as caught:
            await rollout.generate(rollout.request())
        assert caught.value.retry_after_seconds is not None
        gate.open()
        assert [chunk async for chunk in call][-1].HasField("usage")


async def test_the_time_to_come_back_is_the_time_that_it_takes(lm: FrozenLM, directory: Path) -> None:
    async with serving(lm, directory, max_sequences=1, max_waiting=11) as rollout:
        await rollout.generate(long(rollout))
        hogs = [asyncio.create_task(rollout.generate(long(rollout))) for _ in range(12)]
        submissions = [await rollout.submitted.get() for _ in range(13)]
        began = time.perf_counter()
        with pytest.raises(ResourceExhausted, match="12 sequences run or wait, of at most 12") as caught:
            await rollout.generate(rollout.request())
        await asyncio.gather(*hogs)
        waited = time.perf_counter() - began
        assert all(submission.ended.done() for submission in submissions)
        assert caught.value.retry_after_seconds is not None
        # No less than a second is ever said.
        assert waited / 2.5 < caught.value.retry_after_seconds < 2.5 * max(1.0, waited)


async def test_who_has_waited_too_long_is_told_so(lm: FrozenLM, directory: Path) -> None:
    gate = Gate()
    async with serving(lm, directory, gate, max_sequences=1, max_queue_seconds=0.2) as rollout:
        cartridge = rollout.publish(0)
        hog = rollout.stub.Generate(rollout.request(sampling={"n": 2}), timeout=TIMEOUT_SECONDS)
        hogs = await rollout.submitted.get()
        gate.allow(1)
        await hog.read()
        with pytest.raises(ResourceExhausted, match=r"has waited 0\.2 s") as caught:
            await rollout.generate(rollout.request(cartridges=[cartridge], sampling={"n": 2}))
        assert caught.value.retry_after_seconds is not None
        assert (await rollout.submitted.get()).ended.done()
        assert (await rollout.resident()).cartridges[0].references == 0
        # One that has begun is answered, however long the rest of it waits.
        assert hogs.num_open == 2
        gate.open()
        assert sum([chunk.HasField("usage") async for chunk in hog]) == 2
        await rollout.generate(rollout.request())


async def test_cancelling_what_waits_takes_it_out_of_the_queue(lm: FrozenLM, directory: Path) -> None:
    gate = Gate()
    async with serving(lm, directory, gate, max_sequences=1) as rollout:
        asking = Asking(rollout)
        first, _ = await asking.ask("x", 1)
        gone, gones = await asking.ask("a", 10, 3)
        last, _ = await asking.ask("b", 20)
        gate.allow(1)
        await first.read()
        gone.cancel()
        assert await rollout.cancelled.get() is gones
        gate.allow(1)
        await gones.ended
        gate.open()
        assert len(joined([chunk async for chunk in last])[0]) == 4
        assert asking.handed == ["x1", "b20"]


async def test_a_drain_waits_for_what_is_queued(lm: FrozenLM, directory: Path) -> None:
    gate = Gate()
    async with serving(lm, directory, gate, max_sequences=1) as rollout:
        asking = Asking(rollout)
        asked = [await asking.ask(name, 1, 2) for name in "ab"]
        drain = asyncio.ensure_future(rollout.stub.Drain(rollout_pb2.DrainRequest(), timeout=TIMEOUT_SECONDS))
        await rollout.draining.wait()
        gate.open()
        for call, _ in asked:
            chunks = [chunk async for chunk in call]
            assert [len(joined(chunks, index)[0]) for index in range(2)] == [4, 4]
        await drain


async def test_a_failing_engine_tells_those_that_are_queued(lm: FrozenLM, directory: Path) -> None:
    gate = Gate()
    async with serving(lm, directory, gate, max_sequences=1) as rollout:
        asking = Asking(rollout)
        asked = [await asking.ask(name, 1, 2) for name in "ab"]
        gate.failure = RuntimeError("out of memory")
        gate.allow(1)
        for call, submission in asked:
            with pytest.raises(Unavailable, match="out of memory"), typed_errors("rollout"):
                await call.read()
            assert submission.ended.done()
