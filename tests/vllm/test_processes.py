"""The vLLM engine as it is served, with its scheduler and its worker in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from prometheus_client import REGISTRY
from vllm.envs import disable_envs_cache

from foundry.errors import Unavailable
from foundry.model.info import ModelInfo
from foundry.model.lm import FrozenLM
from services.rollout import engine_metrics
from services.rollout.engine import TokenOutput
from services.rollout.engine.vllm.engine import VllmEngine
from tests.tiny import build_tiny_model
from tests.unit.engine.bench import Bench, make_kv, request

_END_SECONDS = 20.0


def start(model: Path) -> Bench:
    engine = VllmEngine(
        model,
        ModelInfo.read(model),
        model_name="tiny",
        device="cpu",
        dtype=torch.float32,
        max_sequences=8,
        max_context_tokens=512,
        prefill_tokens_per_step=512,
        kv_bytes=64 * 1024**2,
        cuda_graphs=False,
    )
    return Bench(FrozenLM.load(model), engine=engine)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"), head_dim=32)


@pytest.fixture(scope="module")
def bench(model: Path) -> Iterator[Bench]:
    # Of the engines that other tests had in this process.
    disable_envs_cache()
    bench = start(model)
    engine: Any = bench.engine
    yield bench
    engine._llm.engine_core.shutdown()


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """vLLM's processes below it."""
    return [each for each in process.children(recursive=True) if each.name().startswith("VLLM")]


def test_versions_lists_and_none_in_one_batch(bench: Bench) -> None:
    for name, num_tokens in (("a@1", 1), ("b@1", 129), ("b@2", 129), ("c@1", 300)):
        bench.load(name, make_kv(bench.lm, num_tokens, seed=int(name[-1])))
    uses: list[tuple[str, ...]] = [(), ("a@1",), ("b@1",), ("b@2",), ("c@1",), ("a@1", "b@2"), ("b@2", "a@1")]
    # The second time out of vLLM's prefix cache.
    for begin in (0, 100):
        requests = {begin + index: request(30 + index, *use, seed=index) for index, use in enumerate(uses)}
        for key, outputs in bench.run(requests).items():
            assert len(outputs) == 8
            bench.check(requests[key], outputs)
    stats = bench.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_used_bytes) == (0, 0, 0)


def test_sequences_have_their_places_and_their_times(bench: Bench) -> None:
    requests = {200 + index: request(5, seed=index, max_new_tokens=40) for index in range(8)}
    bench.engine.admit(requests)
    most, outputs = 0, list[TokenOutput]()
    while bench.engine.stats().num_running or bench.engine.stats().num_waiting:
        outputs += bench.engine.step()
        most = max(most, bench.engine.stats().num_running)
    assert most == 8
    assert all(output.scheduled_at > 0 for output in outputs)


def test_a_cartridge_that_is_unloaded_at_once_after_a_cancellation(bench: Bench) -> None:
    """vLLM's scheduler hears of the cancellation later than its worker would of the other."""
    for key in range(300, 340):
        bench.load(f"left-{key}", make_kv(bench.lm, 100, seed=key))
        bench.engine.admit({key: request(5, f"left-{key}", seed=key, max_new_tokens=100)})
        bench.engine.cancel(key)
        bench.engine.unload(f"left-{key}")
        bench.load(f"other-{key}", make_kv(bench.lm, 20, seed=key))
        asked = request(10, f"other-{key}", seed=key)
        bench.check(asked, bench.run({1000 + key: asked})[1000 + key])
        bench.engine.unload(f"other-{key}")
    engine: Any = bench.engine
    assert not engine._handover._to_forget


def test_vllms_own_metrics_are_served_beside_ours(bench: Bench) -> None:
    labels = {"model_name": "tiny", "engine": "0"}
    before = REGISTRY.get_sample_value("vllm:prompt_tokens_cached_total", labels)
    assert before is not None
    bench.load("metrics", make_kv(bench.lm, 140))
    bench.run({400: request(10, "metrics")})
    assert REGISTRY.get_sample_value("vllm:prompt_tokens_cached_total", labels) == before + 140
    assert REGISTRY.get_sample_value("vllm:num_preemptions_total", labels) == 0
    # Ours are where they were, and nobody else counts in them.
    ours = engine_metrics.EngineMetrics("tiny")
    ours.generation_tokens.inc(3)
    assert REGISTRY.get_sample_value("vllm:generation_tokens_total", labels) == 3


def test_its_death_is_told(model: Path) -> None:
    bench = start(model)
    engine: Any = bench.engine
    core = psutil.Process(engine._llm.engine_core.resources.engine_manager.processes[0].pid)
    # Lest it be through before it is killed.
    core.suspend()
    engine.admit({0: request(5)})
    core.kill()
    with pytest.raises(Unavailable, match="ended"):
        bench.finish([0])
    with pytest.raises(Unavailable, match="ended"):
        engine.stats()


def test_it_does_not_outlive_who_started_it(model: Path) -> None:
    """Killed, that is; it would keep the GPU's memory."""
    code = "from pathlib import Path; from tests.vllm.test_processes import start; import sys, time\n"
    code += f"if __name__ == '__main__': start(Path({str(model)!r})); print('ready', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert any("ready" in line for line in parent.stdout)
        left = descendants(psutil.Process(parent.pid))
        assert len(left) == 2
        parent.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(left, timeout=_END_SECONDS)
    assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]
