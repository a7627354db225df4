"""The rates that `foundry size` reckons with, of our own code on a GPU: python -m benchmarks.gpu_rates

Runs with torch and transformers alone. A model of Llama-3.2-3B's shape with random weights in bfloat16: decoding behind
one 2048-token cartridge, computing and keeping a document's KV, scoring answers behind it, and a training step.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_swap import build, random_cartridge, request
from benchmarks.shapes import LLAMA_3B
from foundry.model.cartridge import TrainableCartridge
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective
from foundry.model.packing import micro_batches
from services.rollout.engine.torch.engine import TorchEngine
from services.teacher.scorer import Item, Want, score
from services.trainer.sample import Sample
from services.trainer.update.step import TrainingStep

CARTRIDGE_TOKENS, DOCUMENT_TOKENS = 2048, 6144
NUM_SAMPLES, TURN_TOKENS, ANSWER_TOKENS = 32, 128, 1024
DECODE_BATCHES = (1, 8, 32, 128, 256)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` runs after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def decode_step(lm: FrozenLM, batch: int) -> float:
    """Seconds of a step with `batch` sequences of about 60 tokens of their own."""
    engine = TorchEngine(lm, max_sequences=batch, max_sequence_tokens=128, prefill_tokens_per_step=1024)
    engine.load("shared", random_cartridge(lm, 1, CARTRIDGE_TOKENS))
    engine.admit({index: request("shared", index, 96) for index in range(batch)})
    while engine.stats().num_waiting:
        engine.step()
    return seconds(engine.step, 30)


def samples() -> list[Sample]:
    turn, answer = list(range(100, 100 + TURN_TOKENS)), list(range(300, 300 + ANSWER_TOKENS))
    return [Sample(turn, answer, [0.0] * ANSWER_TOKENS, "random", 1, False) for _ in range(NUM_SAMPLES)]


def score_all(lm: FrozenLM, micro_batch_tokens: int) -> float:
    kv_L2GPD = lm.prefill(list(range(DOCUMENT_TOKENS)))
    items = [Item("document", sample.ids, sample.score_from) for sample in samples()]

    def work() -> None:
        for some in micro_batches(items, micro_batch_tokens):
            batch = items[some]
            score(lm, batch, [kv_L2GPD] * len(batch), Want(hidden=True)).result()

    return seconds(work, 2)


def training_step(lm: FrozenLM, micro_batch_tokens: int) -> float:
    initial = random_cartridge(lm, 2, CARTRIDGE_TOKENS).kv_L2GPD.to(lm.device)
    step = TrainingStep(
        lm,
        TrainableCartridge(lm, initial),
        Objective("forward_kl"),
        learning_rate=1e-3,
        micro_batch_tokens=micro_batch_tokens,
        # Nothing was rolled out: there is nothing to prove.
        policy_mismatch_threshold=float("inf"),
    )
    signals = [torch.randn(ANSWER_TOKENS, 3072, device=lm.device, dtype=lm.dtype) for _ in range(NUM_SAMPLES)]
    return seconds(lambda: step.run(samples(), signals, prove_policy=True), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "gpu_rates.json")
    arguments = parser.parse_args()
    result: dict[str, object] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    lm = build("cuda", torch.bfloat16, **LLAMA_3B)

    def measure(name: str, work: Callable[[], float]) -> None:
        # An engine of the last measurement is a cycle: its memory would count for this one.
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        result[f"{name}_seconds"] = work()
        result[f"{name}_peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)

    for batch in DECODE_BATCHES:
        measure(f"decode_step_{batch}", partial(decode_step, lm, batch))
    document = list(range(DOCUMENT_TOKENS))
    measure("document", lambda: seconds(lambda: lm.prefill(document), 3))
    for tokens in (2048, 8192):
        measure(f"score_{tokens}", partial(score_all, lm, tokens))
    for tokens in (1152, 2304, 4096):
        measure(f"training_step_{tokens}", partial(training_step, lm, tokens))
    print(json.dumps(result, indent=2))
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
