"""Decoding by the built-in engine, by vLLM and by `transformers`, on one GPU: python -m benchmarks.rollout_peers

A model of Llama-3.2-3B's shape with random weights in bfloat16 answers 128 prompt tokens with 512, in batches of 1 to
256, behind no cartridge, one of 2048 tokens that all share, 8 and 32 distinct ones. One after the other, each in a
process of its own:
- the built-in engine (`benchmarks.rollout`, which has its rates);
- vLLM as served, cartridges by our connector, with seeds, logprobs and text for every token;
- vLLM without them, the 2048 tokens a prompt that it has cached: what it does by itself;
- `transformers.generate` behind the same prefix, batched, 64 tokens.
Before its rates vLLM is judged by a float32 forward of the same weights: greedy answers behind two versions of every
length, the second time out of its prefix cache, and as if the other version had given them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks.rollout import ANSWER_TOKENS, BATCHES, CARTRIDGE_TOKENS, CARTRIDGES, LENGTHS, PROMPT_TOKENS
from benchmarks.shapes import LLAMA_3B, build_model

GENERATED_TOKENS = 64


def built_in(_model: Path) -> dict[str, Any]:
    from benchmarks.rollout import rates

    found = rates()["rates"]
    return {"rates": {case: row["tokens_per_second"] for case, row in found.items()}}


def generated(model: Path) -> dict[str, Any]:
    """Tokens a second from the first token on: of two calls, one of which ends there."""
    from transformers import AutoModelForCausalLM, DynamicCache

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    lm = loaded.cuda()
    shape = LLAMA_3B["num_key_value_heads"], CARTRIDGE_TOKENS, LLAMA_3B["head_dim"]
    kv_L2GPD = torch.randn((LLAMA_3B["num_hidden_layers"], 2, *shape), device="cuda").bfloat16() * 0.1

    def seconds(batch: int, num_new: int) -> float:
        past = DynamicCache()
        for layer, kv_2GPD in enumerate(kv_L2GPD):
            past.update(*(each.expand(batch, *each.shape).contiguous() for each in kv_2GPD), layer)
        ids = torch.randint(10, 100_000, (batch, CARTRIDGE_TOKENS + PROMPT_TOKENS), device="cuda")
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.inference_mode():
            lm.generate(
                ids,
                past_key_values=past,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_new,
                min_new_tokens=num_new,
                do_sample=True,
                pad_token_id=0,
            )
        torch.cuda.synchronize()
        return time.perf_counter() - began

    rates: dict[str, float | str] = {}
    # What is made at the first use.
    seconds(1, 4)
    for batch in BATCHES:
        case = f"{batch} behind 1"
        try:
            decoding = seconds(batch, 1 + GENERATED_TOKENS) - seconds(batch, 1)
        except torch.OutOfMemoryError:
            rates[case] = "out of memory"
            continue
        rates[case] = round(batch * GENERATED_TOKENS / decoding, 1)
    return {"rates": rates}


def by_vllm(model: Path) -> dict[str, Any]:
    import vllm

    from benchmarks import gpu_vllm

    exact, engine, start_seconds = gpu_vllm.load(model)
    print(f"vLLM started in {start_seconds:.0f} s", flush=True)
    correct = gpu_vllm.correctness(engine, exact, LENGTHS)
    print(json.dumps(correct, indent=1), flush=True)
    cartridge = gpu_vllm.random_cartridge(exact.spec, 1)
    for index in range(max(CARTRIDGES)):
        engine.load(f"c{index}", cartridge)
    ids: Iterator[int] = count(10_000)
    document = tuple(gpu_vllm.document_ids(7, CARTRIDGE_TOKENS))
    rates: dict[str, float] = {}
    cached: dict[str, float] = {}
    for num_cartridges in CARTRIDGES:
        for batch in BATCHES:
            use = [(f"c{index % num_cartridges}",) if num_cartridges else () for index in range(batch)]
            found = gpu_vllm.speed(engine, batch, use, ids)
            rates[f"{batch} behind {num_cartridges}"] = round(found["decode_tokens_per_second"], 1)
            print(f"vLLM, {batch} behind {num_cartridges}: {found}", flush=True)
    for batch in BATCHES:
        found = gpu_vllm.speed(engine, batch, [()] * batch, ids, document)
        cached[f"{batch} behind 1"] = round(found["decode_tokens_per_second"], 1)
        print(f"vLLM, {batch} behind a cached prompt: {found}", flush=True)
    told = {"version": vllm.__version__, "start_seconds": round(start_seconds, 1)}
    return {"vllm": told, "correct": correct, "rates": rates, "cached_prompt": cached}


def device_name() -> str:
    return torch.cuda.get_device_name()


PEERS = {"vLLM": by_vllm, "built-in": built_in, "generate": generated}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="for the model's files")
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "rollout_peers.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "prompt_tokens": PROMPT_TOKENS,
        "answer_tokens": ANSWER_TOKENS,
        "cartridge_tokens": CARTRIDGE_TOKENS,
        "peers": {},
    }
    with (
        tempfile.TemporaryDirectory(dir=arguments.directory) as directory,
        # A process each, so that none of the GPU's memory stays with the next one.
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as processes,
    ):
        model = Path(directory)
        result["device"] = processes.submit(device_name).result()
        processes.submit(build_model, model, "cuda", LLAMA_3B, 8192).result()
        for name in arguments.only:
            result["peers"][name] = processes.submit(PEERS[name], model).result()
            print(name, json.dumps(result["peers"][name]["rates"], indent=1), flush=True)
            arguments.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
