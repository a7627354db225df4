"""The teacher's scoring behind long documents on a GPU: python -m benchmarks.teacher

Runs with torch and transformers alone. First hidden states are compared with those of layers that are not compiled, on
a small model; wrong ones end the benchmark. Then a model of Llama-3.2-3B's shape with random weights in bfloat16 scores
32 samples of 128 turn and 1024 answer tokens behind one document, whose KV is kept and, for timing, random. Seconds are
those until all hidden states are in the host's memory.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_swap import build
from benchmarks.shapes import LLAMA_3B
from benchmarks.update import ANSWER_TOKENS, SMALL, TURN_TOKENS, measure, samples_of
from foundry.model.attention.packed import PackedAttention
from foundry.model.lm import FrozenLM
from foundry.model.packing import CUDA_MICRO_BATCH_TOKENS, micro_batches
from services.teacher.scorer import Item, Want, score

NUM_SAMPLES = 32
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def random_kv(lm: FrozenLM, num_tokens: int) -> torch.Tensor:
    return torch.randn(lm.spec.kv_shape(num_tokens), device=lm.device, dtype=lm.dtype)


def items_of(lengths: list[tuple[int, int]]) -> list[Item]:
    return [Item("document", sample.ids, sample.score_from) for sample in samples_of(lengths)]


def hidden(lm: FrozenLM, items: list[Item], contexts: list[torch.Tensor]) -> torch.Tensor:
    scores = score(lm, items, contexts, Want(hidden=True)).result()
    return torch.cat([each.hidden_NE for each in scores if each.hidden_NE is not None])


def gate() -> dict[str, float]:
    """Relative L2 errors of hidden states, of several documents in one micro-batch. Raises if one is too large."""
    items = items_of([(17, 200), (128, 300), (5, 30), (100, 28), (1, 1)])
    errors = {}
    for dtype, largest in LARGEST_ERROR.items():
        lm = build("cuda", dtype, **SMALL)
        documents = [random_kv(lm, num_tokens) for num_tokens in (1000, 256)]
        contexts = [documents[index % 2] for index in range(len(items))]
        found = hidden(lm, items, contexts)
        lm.packed_plan = PackedAttention
        expected = hidden(lm, items, contexts)
        name = str(dtype).removeprefix("torch.")
        errors[name] = ((found - expected).float().norm() / expected.float().norm()).item()
        print(f"hidden states' relative error, {name}: {errors[name]:.2e} (at most {largest:.0e})", flush=True)
        assert errors[name] < largest, "hidden states are wrong: nothing is measured"
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the gate, and a document of 12,288 tokens")
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "teacher.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(result["device"])
    result["hidden_errors"] = gate()
    # Code compiled for the small models would count towards how often one function may be compiled.
    torch.compiler.reset()
    lm = build("cuda", torch.bfloat16, max_position_embeddings=131072, **LLAMA_3B)
    items = items_of([(TURN_TOKENS, ANSWER_TOKENS)] * NUM_SAMPLES)
    result["rows"] = []
    print(f"{'document':>8}{'seconds':>9}{'tokens/s':>10}{'peak GB':>9}{'first, s':>10}")
    for num_tokens in [12_288] if arguments.quick else [2048, 12_288, 100_000]:
        gc.collect()
        torch.cuda.empty_cache()
        kv_L2GPD = random_kv(lm, num_tokens)

        def work(kv_L2GPD: torch.Tensor = kv_L2GPD) -> None:
            begun = [
                score(lm, items[some], [kv_L2GPD] * len(items[some]), Want(hidden=True))
                for some in micro_batches(items, CUDA_MICRO_BATCH_TOKENS)
            ]
            for scoring in begun:
                scoring.result()

        row = measure(work, 3)
        del kv_L2GPD, work
        result["rows"].append({"document_tokens": num_tokens, "samples": NUM_SAMPLES, **row})
        rate = NUM_SAMPLES * (TURN_TOKENS + ANSWER_TOKENS) / row["seconds"]
        print(
            f"{num_tokens:8}{row['seconds']:9.3f}{rate:10.0f}{row['peak_gb']:9.2f}{row['first_step_seconds']:10.1f}",
            flush=True,
        )
        arguments.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
