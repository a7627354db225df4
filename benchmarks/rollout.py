"""Decoding rates of the built-in engine on a GPU, and whether it is right there: python -m benchmarks.rollout

Runs with torch, transformers and Triton alone. First small models are decoded behind cartridges of many lengths and
judged by a float32 forward of the same weights; what is wrong ends the benchmark. Then a model of Llama-3.2-3B's shape
with random weights in bfloat16 answers 128 prompt tokens with 512, in batches, behind no cartridge, one that all share,
and several.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_swap import build, random_cartridge
from benchmarks.shapes import LLAMA_3B
from foundry.model.attention.packed import PackedAttention
from services.rollout.engine import SamplingParams, SequenceRequest
from services.rollout.engine.torch.engine import TorchEngine

CARTRIDGE_TOKENS, PROMPT_TOKENS, ANSWER_TOKENS = 2048, 128, 512
BATCHES = (1, 8, 32, 128, 256)
CARTRIDGES = (0, 1, 8, 32)
SMALL: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 1024, "num_hidden_layers": 4}
# Query heads, kv heads, head dim.
HEADS = ((8, 4, 64), (6, 2, 128), (4, 4, 96))
LENGTHS = (1, 16, 37, 100, 128, 2048)
# Nats: of a greedy token's logprob below the best, and of a reported logprob from the right one.

TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 0.15}


def request(seed: int, num_prompt: int, num_new: int, *digests: str, temperature: float = 1.0) -> SequenceRequest:
    ids = torch.randint(3, 100_000, (num_prompt,), generator=torch.Generator().manual_seed(seed)).tolist()
    sampling = SamplingParams(max_new_tokens=num_new, temperature=temperature, seed=seed, ignore_eos=True)
    return SequenceRequest(tuple(ids), digests, sampling)


def check(dtype: torch.dtype, heads: tuple[int, int, int], lengths: Sequence[int]) -> dict[str, float]:
    """Ten cartridges, three of which are versions of one, and none: greedy and drawn, from cold and from warm slots."""
    num_heads, num_kv_heads, head_dim = heads
    shape = SMALL | {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "head_dim": head_dim}
    torch._dynamo.reset()
    lm = build("cuda", dtype, **shape)
    exact = build("cuda", torch.float32, lm.model.state_dict(), **shape)
    exact.packed_plan = PackedAttention
    engine = TorchEngine(lm, max_sequences=8, max_sequence_tokens=192, prefill_tokens_per_step=64)
    regrets, errors = [], []
    for num_tokens, turn in itertools.product(lengths, ("cold", "warm")):
        cartridges = {f"{num_tokens}-{seed}": random_cartridge(lm, seed, num_tokens) for seed in range(10)}
        if turn == "cold":
            for digest, cartridge in cartridges.items():
                engine.load(digest, cartridge)
        names = list(cartridges)
        behind = [[], *([name] for name in names[:1] + names), [names[1], names[0]], names[:6], []]
        requests = {
            index: request(index, 5 + 13 * (index % 7), 12 + index, *digests, temperature=index % 2)
            for index, digests in enumerate(behind)
        }
        engine.admit(requests)
        answers: dict[int, list[tuple[int, float]]] = {index: [] for index in requests}
        while engine.stats().num_running or engine.stats().num_waiting:
            for output in engine.step():
                answers[output.sequence_id].append((output.token_id, output.logprob))
        for index, each in requests.items():
            ids, told = zip(*answers[index], strict=True)
            kvs = [cartridges[digest].kv_L2GPD.float().cuda() for digest in each.digests]
            prefix = torch.cat(kvs, dim=3) if kvs else None
            with torch.no_grad():
                hidden = exact.packed_hidden([[*each.prompt_ids, *ids[:-1]]], [prefix])[len(each.prompt_ids) - 1 :]
                logprobs = exact.logits(hidden).log_softmax(dim=-1).cpu()
            chosen = logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0]
            errors.append((chosen - torch.tensor(told)).abs().max().item())
            if each.sampling.temperature == 0:
                regrets.append((logprobs.max(dim=-1).values - chosen).max().item())
    found = {"largest_regret_nats": max(regrets), "largest_logprob_error_nats": max(errors)}
    print(f"{dtype} heads {heads}: {found}", flush=True)
    assert max(found.values()) < TOLERANCES[dtype], "the engine is wrong on this device"
    return found


def rate(engine: TorchEngine, batch: int, num_cartridges: int) -> dict[str, float]:
    """Of steps in which every sequence decodes."""
    numbers = itertools.count()
    digests = [(f"c{index % num_cartridges}",) if num_cartridges else () for index in range(batch)]
    engine.admit(
        {next(numbers): request(index, PROMPT_TOKENS, ANSWER_TOKENS, *each) for index, each in enumerate(digests)}
    )
    began = time.perf_counter()
    while len(engine.step()) < batch:
        pass
    decoding = time.perf_counter()
    times = []
    while engine.stats().num_running == batch:
        step_began = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - step_began)
    seconds = time.perf_counter() - decoding
    for index in range(batch):
        engine.cancel(index)
    while engine.step():
        pass
    found = {
        "tokens_per_second": round(batch * len(times) / seconds, 1),
        "step_median_ms": round(statistics.median(times) * 1e3, 3),
        "graph_ms": round(graph_seconds(engine, batch) * 1e3, 3),
        "prompts_seconds": round(decoding - began, 4),
    }
    print(f"batch {batch}, {num_cartridges} cartridges: {found}", flush=True)
    return found


def graph_seconds(engine: TorchEngine, batch: int) -> float:
    """What the device takes for the last decoding step of the batch, computed again and again."""
    runner: Any = engine._runner
    step = next(each for each in reversed(runner._decoding) if each.shape.num_tokens >= batch)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(20):
        step._graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 20e3


def checks(quick: bool) -> dict[str, Any]:
    all_heads, lengths = (HEADS[1:2], (37, 1024)) if quick else (HEADS, LENGTHS)
    return {
        f"{dtype}, heads {heads}": check(dtype, heads, lengths)
        for dtype, heads in itertools.product(TOLERANCES, all_heads)
    }


def rates() -> dict[str, Any]:
    lm = build("cuda", torch.bfloat16, **LLAMA_3B)
    began = time.perf_counter()
    engine = TorchEngine(
        lm,
        max_sequences=max(BATCHES),
        max_sequence_tokens=PROMPT_TOKENS + ANSWER_TOKENS,
        prefill_tokens_per_step=2048,
    )
    result: dict[str, Any] = {"start_seconds": round(time.perf_counter() - began, 1)}
    cartridge = random_cartridge(lm, 1, CARTRIDGE_TOKENS)
    for index in range(max(CARTRIDGES)):
        engine.load(f"c{index}", cartridge)
    result["rates"] = {
        f"{batch} behind {num_cartridges}": rate(engine, batch, num_cartridges)
        for num_cartridges in CARTRIDGES
        for batch in BATCHES
    }
    return result | {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["checks", "rates"], help="one of the two files of results")
    parser.add_argument("--quick", action="store_true", help="fewer checks")
    arguments = parser.parse_args()
    device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    if arguments.only != "rates":
        _write("rollout_checks", device | {"checks": checks(arguments.quick)})
        gc.collect()
        torch._dynamo.reset()
    if arguments.only != "checks":
        _write("rollout", device | rates())


def _write(name: str, result: dict[str, Any]) -> None:
    (Path(__file__).parent / "results" / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
