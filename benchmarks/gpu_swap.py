"""What a new version costs the sequences in flight on a GPU: python -m benchmarks.gpu_swap

Runs with torch and transformers alone. A model of Llama-3.2-3B's shape with random weights decodes 32 sequences behind
a 2048-token cartridge (234.9 MB) while others like it are loaded beside it from pageable host memory: by the engine's
own way (pinned staging, a stream of its own), and by a plain `.to(device)`. First the engine is checked on this device
against a float32 forward.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.shapes import LLAMA_3B
from foundry.buffers import allocate
from foundry.model.cartridge import Cartridge
from foundry.model.lm import FrozenLM
from services.rollout.engine import SamplingParams, SequenceRequest
from services.rollout.engine.torch.engine import TorchEngine
from services.rollout.engine.torch.sequence import LoadedCartridge
from tests.tiny import build_tokenizer

NUM_SEQUENCES, NUM_TOKENS, NUM_LOADS = 32, 2048, 10


def build(device: str, dtype: torch.dtype, weights: Mapping[str, Tensor] | None = None, **shape: Any) -> FrozenLM:
    """With random weights, or these. On a CPU it keeps them in another form: its state is not for others."""
    torch.manual_seed(0)
    wide = {"vocab_size": 128256, "max_position_embeddings": 8192, "eos_token_id": 2, "bos_token_id": None}
    config = LlamaConfig(**(wide | shape))
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    if weights is not None:
        model.load_state_dict(weights)
    return FrozenLM(model.to(dtype), build_tokenizer(), "blake3:" + "0" * 64)


def random_cartridge(lm: FrozenLM, seed: int, num_tokens: int = NUM_TOKENS) -> Cartridge:
    header = lm.spec.header(num_tokens, 1, lm.dtype)
    memory = torch.frombuffer(allocate(header.num_bytes), dtype=lm.dtype)
    generator = torch.Generator().manual_seed(seed)
    memory.copy_(torch.randn(memory.shape, generator=generator) * 0.1)
    return Cartridge(header, memory.view(header.shape))


def request(digest: str, seed: int, num_new: int) -> SequenceRequest:
    sampling = SamplingParams(max_new_tokens=num_new, temperature=0.0, seed=seed, ignore_eos=True)
    return SequenceRequest(tuple(range(10 + seed, 40 + seed)), (digest,), sampling)


def regret(device: str) -> dict[str, float]:
    """Teacher-forced: how far below the float32 forward's best token the engine's greedy ones lie, in nats."""
    small: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    }
    lm = build(device, torch.bfloat16, **small, num_key_value_heads=4, head_dim=64)
    cartridge = random_cartridge(lm, 1, 300)
    engine = TorchEngine(lm, max_sequences=4, max_sequence_tokens=256, prefill_tokens_per_step=64)
    engine.load("a", cartridge)
    loaded = engine._cartridges["a"].kv_L2GPD
    assert torch.equal(loaded.cpu(), cartridge.kv_L2GPD), "the bytes on the device are not the cartridge's"
    engine.admit({seed: request("a", seed, 64) for seed in range(4)})
    answers: dict[int, list[int]] = {seed: [] for seed in range(4)}
    while engine.stats().num_running or engine.stats().num_waiting:
        for output in engine.step():
            answers[output.sequence_id].append(output.token_id)
    exact = build("cpu", torch.float32, lm.model.state_dict(), **small, num_key_value_heads=4, head_dim=64)
    regrets: list[float] = []
    for seed, answer in answers.items():
        prompt = list(range(10 + seed, 40 + seed))
        hidden = exact.packed_hidden([[*prompt, *answer[:-1]]], [cartridge.kv_L2GPD.float()])[len(prompt) - 1 :]
        logprobs = exact.logits(hidden).log_softmax(dim=-1)
        chosen = logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0]
        regrets += (logprobs.max(dim=-1).values - chosen).tolist()
    return {"largest_regret_nats": max(regrets), "argmax_equal": sum(each == 0 for each in regrets) / len(regrets)}


def swaps(engine: TorchEngine, cartridges: list[Cartridge], load: Callable[[str, Cartridge], None]) -> dict[str, float]:
    """Milliseconds of decode steps, calm and while another thread loads one cartridge after the other."""
    calm, busy, loads = [], [], []
    done = threading.Event()

    def load_all() -> None:
        for index in range(NUM_LOADS):
            began = time.perf_counter()
            load(f"new-{index % 2}", cartridges[index % len(cartridges)])
            loads.append((time.perf_counter() - began) * 1e3)
            time.sleep(0.02)
        done.set()

    engine.admit({index: request("old", index, 1500) for index in range(NUM_SEQUENCES)})
    loader = threading.Thread(target=load_all)
    for index in range(10_000):
        began = time.perf_counter()
        engine.step()
        torch.cuda.synchronize()
        milliseconds = (time.perf_counter() - began) * 1e3
        if 20 <= index < 120:
            calm.append(milliseconds)
        elif index > 120:
            busy.append(milliseconds)
        if index == 120:
            loader.start()
        if done.is_set():
            break
    loader.join()
    for index in range(NUM_SEQUENCES):
        engine.cancel(index)
    return {
        "calm_median_ms": statistics.median(calm),
        "calm_largest_ms": max(calm),
        "loading_median_ms": statistics.median(busy),
        "loading_largest_ms": max(busy),
        "load_median_ms": statistics.median(loads[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "gpu_swap.json")
    arguments = parser.parse_args()
    result: dict[str, object] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    result["correct"] = regret("cuda")
    print(result)
    lm = build("cuda", torch.bfloat16, **LLAMA_3B)
    engine = TorchEngine(lm, max_sequences=NUM_SEQUENCES, max_sequence_tokens=2048, prefill_tokens_per_step=1024)
    cartridges = [random_cartridge(lm, seed) for seed in range(3)]
    engine.load("old", cartridges[0])

    def plainly(digest: str, cartridge: Cartridge) -> None:
        there: Tensor = cartridge.kv_L2GPD.to(lm.device)
        engine._cartridges[digest] = LoadedCartridge(digest, there)

    for round_ in range(2):
        result[f"engine_{round_}"] = swaps(engine, cartridges[1:], engine.load)
        result[f"plain_{round_}"] = swaps(engine, cartridges[1:], plainly)
    print(json.dumps(result, indent=2))
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
