"""Work that ends before its time: by the caller, by a drain, by a failing engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2

from foundry.errors import DeadlineExceeded, Unavailable
from foundry.model.lm import FrozenLM
from foundry.rpc import probe
from foundry.rpc.channel import typed_errors
from foundry.v1 import rollout_pb2
from tests.contract.rollout.server import TIMEOUT_SECONDS, Gate, joined, long, serving, status


async def test_cancelling_a_stream_frees_its_slot_within_a_step(lm: FrozenLM, directory: Path) -> None:
    gate = Gate()
    async with serving(lm, directory, gate, max_sequences=1) as rollout:
        cartridge = rollout.publish(0)
        call = rollout.stub.Generate(long(rollout, cartridges=[cartridge]), timeout=TIMEOUT_SECONDS)
        submission = await rollout.submitted.get()
        gate.allow(2)
        await call.read()
        waiting = asyncio.create_task(rollout.generate(rollout.request()))
        await rollout.submitted.get()
        call.cancel()
        assert await rollout.cancelled.get() is submission
        assert not submission.ended.done()
        # The step that has begun, and no other.
        gate.allow(1)
        await submission.ended
        assert (await rollout.resident()).cartridges[0].references == 0
        gate.allow(6)
        assert len(joined(await waiting)[0]) == 6


async def test_a_deadline_frees_the_slots(lm: FrozenLM, directory: Path) -> None:
    gate = Gate()
    async with serving(lm, directory, gate) as rollout:
        message = rollout_pb2.GenerateBatchRequest(requests=[long(rollout)] * 3)
        for call in (
            rollout.stub.Generate(long(rollout), timeout=0.3),
            rollout.stub.GenerateBatch(message, timeout=0.3),
        ):
            with pytest.raises(DeadlineExceeded), typed_errors("rollout"):
                await call.read()
            submission = await rollout.cancelled.get()
            gate.allow(1)
            await submission.ended
        stats = rollout.parts.driver._engine.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)


async def test_drain_refuses_new_work_and_returns_when_idle(lm: FrozenLM, directory: Path) -> None:
    gate = Gate()
    async with serving(lm, directory, gate) as rollout:
        call = rollout.stub.Generate(rollout.request(), timeout=TIMEOUT_SECONDS)
        submission = await rollout.submitted.get()
        drain = asyncio.ensure_future(rollout.stub.Drain(rollout_pb2.DrainRequest(), timeout=TIMEOUT_SECONDS))
        await rollout.draining.wait()
        # Who balances by health goes elsewhere; who comes all the same is refused.
        assert await status(rollout.channel) == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(Unavailable, match="draining"):
            await rollout.generate(rollout.request())
        assert not drain.done()
        gate.open()
        assert len(joined([chunk async for chunk in call])[0]) == 6
        await drain
        assert submission.ended.done()


async def test_a_hook_drains_by_the_probe(lm: FrozenLM, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate = Gate()
    async with serving(lm, directory, gate) as rollout:
        call = rollout.stub.Generate(rollout.request(), timeout=TIMEOUT_SECONDS)
        submission = await rollout.submitted.get()
        assert await asyncio.to_thread(probe.main, ["--drain", "0.5", rollout.address]) == 1
        assert f"{rollout.address}: DEADLINE_EXCEEDED" in capsys.readouterr().err
        # Who asked has given up; the server goes on refusing, and what was in flight has that much less time.
        with pytest.raises(Unavailable, match="draining"):
            await rollout.generate(rollout.request())
        assert 0 < rollout.parts.driver.grace_left(60) < 60
        draining = asyncio.create_task(asyncio.to_thread(probe.main, ["--drain", "30", rollout.address]))
        gate.open()
        assert await draining == 0
        assert submission.ended.done()
        assert len(joined([chunk async for chunk in call])[0]) == 6


async def test_a_failing_engine_tells_every_waiter(lm: FrozenLM, directory: Path) -> None:
    gate = Gate()
    async with serving(lm, directory, gate, max_sequences=1) as rollout:
        cartridge = rollout.publish(0)
        calls = [
            asyncio.create_task(rollout.generate(long(rollout, cartridges=[cartridge]))),
            asyncio.create_task(rollout.generate(long(rollout))),
            asyncio.create_task(rollout.batch([long(rollout)] * 2)),
        ]
        for _ in calls:
            await rollout.submitted.get()
        gate.failure = RuntimeError("out of memory")
        gate.allow(1)
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(result, Unavailable)
            assert "out of memory" in result.message
        assert rollout.parts.driver.failed.is_set()
        with pytest.raises(Unavailable, match="out of memory"):
            await rollout.generate(rollout.request())
        assert (await rollout.resident()).cartridges[0].references == 0
