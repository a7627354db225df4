"""What several GPUs make of an update: torchrun --nproc-per-node=2 -m benchmarks.ranks

Runs with torch, transformers and safetensors alone. A model of Llama-3.2-3B's shape with random weights trains a
2048-token cartridge on answers of uneven lengths, by rank 0 alone and by all ranks; the gradients are compared. How
much they may differ is shown by rank 0 alone with other micro-batches: bfloat16 rounds each order of sums differently.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_swap import build
from benchmarks.shapes import LLAMA_3B, TINY
from foundry.model.cartridge import TrainableCartridge
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective
from services.trainer.ranks.follower import follow
from services.trainer.ranks.group import Group, Rank
from services.trainer.ranks.leader import Leader
from services.trainer.sample import Sample
from services.trainer.update.gradient import Signal
from services.trainer.update.step import TrainingStep

MICRO_BATCH_TOKENS, TIMEOUT_SECONDS = 4096, 600.0


class Bench:
    def __init__(self, lm: FrozenLM, num_samples: int, num_tokens: int) -> None:
        """A step of `num_samples` answers behind a cartridge of `num_tokens`."""
        draw, spec = random.Random(0), lm.spec
        self.lm = lm
        self.samples = [
            Sample(range(30, 30 + draw.randrange(20, 80)), range(100, 100 + length), [-1.0] * length, "", 0, False)
            for length in (draw.randrange(32, 512) for _ in range(num_samples))
        ]
        # On the CPU, as they come from the teacher.
        self.signals: list[Signal] = [
            torch.randn(len(sample.answer_ids), spec.hidden_size).to(lm.dtype) for sample in self.samples
        ]
        shape = spec.kv_shape(num_tokens)
        self._kv_L2GPD = (torch.randn(shape) * 0.1).to(lm.device, lm.dtype)

    def step(self, leader: Leader | None, micro_batch_tokens: int = MICRO_BATCH_TOKENS) -> TrainingStep:
        return TrainingStep(
            self.lm,
            TrainableCartridge(self.lm, self._kv_L2GPD),
            Objective("forward_kl"),
            learning_rate=0.02,
            micro_batch_tokens=micro_batch_tokens,
            policy_mismatch_threshold=float("inf"),
            leader=leader,
        )

    def gradient(self, leader: Leader | None, micro_batch_tokens: int = MICRO_BATCH_TOKENS) -> Tensor:
        step = self.step(leader, micro_batch_tokens)
        step.run(self.samples, self.signals, prove_policy=True)
        assert step.cartridge.master_L2GRD.grad is not None
        return step.cartridge.master_L2GRD.grad

    def seconds(self, leader: Leader | None, num_rounds: int) -> Sequence[float]:
        step, seconds = self.step(leader), []
        for _ in range(num_rounds + 1):
            began = time.perf_counter()
            # Its numbers are read on the host: no kernel is left when it returns.
            step.run(self.samples, self.signals, prove_policy=True)
            seconds.append(time.perf_counter() - began)
        return seconds[1:]


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def measure(bench: Bench, leader: Leader, num_rounds: int) -> dict[str, object]:
    alone, together = bench.gradient(None), bench.gradient(leader)
    result: dict[str, object] = {
        "answer_tokens": sum(len(sample.answer_ids) for sample in bench.samples),
        "gradient_difference": difference(together, alone),
        "gradient_difference_of_micro_batches": difference(bench.gradient(None, MICRO_BATCH_TOKENS // 2), alone),
        "same_bits_again": torch.equal(together, bench.gradient(leader)),
        "same_bits_again_alone": torch.equal(alone, bench.gradient(None)),
    }
    # Round about, so that a machine that slows down does so for both.
    times: dict[str, list[float]] = {"alone": [], "together": []}
    for _ in range(2):
        times["alone"] += bench.seconds(None, num_rounds)
        times["together"] += bench.seconds(leader, num_rounds)
    for name, seconds in times.items():
        result[f"update_{name}_ms"] = statistics.median(seconds) * 1e3
    result["speed_up"] = statistics.median(times["alone"]) / statistics.median(times["together"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model and cartridge, to try the program")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--result", type=Path, default=None)
    arguments = parser.parse_args()
    rank = Rank.of_process()
    device = torch.device(rank.device(arguments.device))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    group = Group(rank, device, TIMEOUT_SECONDS)
    lm = build(str(device), dtype, **(TINY if arguments.small else LLAMA_3B))
    if not rank.leads:
        raise SystemExit(follow(lm, group))
    leader = Leader(group)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    result = {"device": name, "torch": torch.__version__, "num_ranks": rank.num_ranks}
    bench = Bench(lm, arguments.samples, 64 if arguments.small else 2048)
    text = json.dumps(result | measure(bench, leader, arguments.rounds), indent=2)
    print(text)
    if arguments.result is not None:
        arguments.result.write_text(text + "\n")
    leader.end(0)


if __name__ == "__main__":
    main()
