"""An on-policy step of the demo on a CPU, stage by stage, beside what matrix products allow: python -m benchmarks.cpu

The demo's document, model, cartridge and shapes, through the product's own code in one process: the engine answers the
first held-out questions at temperature 1 (every answer to its full length), the teacher scores the answers behind the
document, whose KV is kept, the trainer takes its step. Stages take turns; seconds are medians.

GFLOP are those that the result needs. With W the weights of all layers' products, T tokens that go through the layers,
A pairs of a query and a key that it sees, N answer tokens, V x E the head, and H x D the queries of L layers:

    forward   2 W T + 4 L H D A, and 2 V E N where logits are wanted
    update    2 W T + 4 L H D A forward, and as much for the tokens and twice as much for the pairs backward (frozen
              weights have no gradient); 6 V E N for the teacher's and the student's logits and their gradient

Run it with OMP_WAIT_POLICY=PASSIVE, as the local stack runs: else CPU seconds count threads that wait for each other.

`rate` is what all products of the layers reach, one after the other, with as many rows as the stage has in its forward,
in the same turns: the floor is GFLOP / rate. `products`, `attention`, `others` and `Python` are shares of the stage's
seconds in one further run under torch's profiler.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from examples.demo import DOCUMENT, processor, read_questions
from foundry.identity import content_digest
from foundry.local.demo_model import resolve_model
from foundry.model.cartridge import TrainableCartridge
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective
from foundry.model.packed_linear import PackedLinear
from foundry.model.template import ChatTemplate
from foundry.recipes import choose
from foundry.store.spec import RunRequest, RunSpec
from services.rollout.engine import SamplingParams, SequenceRequest
from services.rollout.engine.torch.engine import TorchEngine
from services.teacher.scorer import Item, Want, score
from services.trainer.sample import Sample
from services.trainer.update.gradient import Signal
from services.trainer.update.step import TrainingStep

# As the local stack and the settings have them.
PREFILL_TOKENS_PER_STEP, MAX_SEQUENCE_TOKENS = 512, 4096
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "mkl::_mkl_linear")
ATTENTION = "scaled_dot_product"


@dataclass(frozen=True)
class Stage:
    """What is run and measured, its GFLOP, and rows of its products."""

    work: Callable[[], object]
    gflop: float
    rows: int


class Step:
    """The demo's on-policy step."""

    def __init__(self) -> None:
        lm = self.lm = FrozenLM.load(resolve_model("demo"))
        template = ChatTemplate(lm.tokenizer, datetime(2024, 7, 26, tzinfo=UTC))
        document = DOCUMENT.read_text()
        context = template.context(document)
        request = RunRequest(name="demo", document=content_digest(document.encode()), recipe="quick")
        spec = self.spec = choose(request, len(context))
        self.turns = [template.turn(question.messages) for question in read_questions(spec.batch_size)]
        self.context_L2GPD = lm.prefill(context)
        kv_L2GPD = self.context_L2GPD[:, :, :, : spec.num_tokens]
        cartridge = TrainableCartridge(lm, kv_L2GPD, num_frozen=spec.num_frozen)
        self.engine = TorchEngine(
            lm,
            max_sequences=spec.batch_size,
            max_sequence_tokens=MAX_SEQUENCE_TOKENS,
            prefill_tokens_per_step=PREFILL_TOKENS_PER_STEP,
        )
        self.engine.load("cartridge", cartridge.snapshot())
        self.training = training_step(lm, cartridge, spec)
        self.decoding_seconds = 0.0
        self.samples: list[Sample] = []
        self.signals: list[Signal] = []

    def prompts(self) -> None:
        """Until every sequence has its first token."""
        sampling = [
            SamplingParams(self.spec.max_new_tokens, seed=seed, ignore_eos=True) for seed in range(len(self.turns))
        ]
        requests = {
            index: SequenceRequest(tuple(turn), ("cartridge",), sampling[index], skip_prefix_cache=True)
            for index, turn in enumerate(self.turns)
        }
        self.engine.admit(requests)
        self.answers: dict[int, list[tuple[int, float]]] = {index: [] for index in requests}
        while not all(self.answers.values()):
            self._decode_step()

    def decoding(self) -> None:
        while self.engine.stats().num_running:
            self._decode_step()
        self.samples = []
        for index, turn in enumerate(self.turns):
            ids, logprobs = zip(*self.answers[index], strict=True)
            self.samples.append(Sample(turn, ids, logprobs, "", 0, True))

    def teacher(self) -> None:
        items = [Item("document", sample.ids, sample.score_from) for sample in self.samples]
        scores = score(self.lm, items, [self.context_L2GPD] * len(items), Want(hidden=True)).result()
        self.signals = [each.hidden_NE for each in scores if each.hidden_NE is not None]

    def update(self) -> None:
        # The rate is 0, so that every turn has the same policy and the proof holds.
        self.training.run(self.samples, self.signals, prove_policy=True, learning_rate_scale=0.0)

    def _decode_step(self) -> None:
        for output in self.engine.step():
            self.answers[output.sequence_id].append((output.token_id, output.logprob))

    def stages(self) -> dict[str, Stage]:
        lm, spec = self.lm, self.spec
        num_turn, num_answer = sum(map(len, self.turns)), spec.batch_size * spec.max_new_tokens
        # The last token of an answer goes through no layer.
        num_scored = num_turn + num_answer - spec.batch_size
        layers, head = 2 * num_weights(lm), 2 * lm.head_VE.numel()
        pair = 4 * spec_heads(lm)

        def pairs(prefix: int, begin: Sequence[int], end: Sequence[int]) -> int:
            return sum((b + 1 + e) * (e - b) // 2 + prefix * (e - b) for b, e in zip(begin, end, strict=True))

        turns = [len(turn) for turn in self.turns]
        ends = [turn + spec.max_new_tokens - 1 for turn in turns]
        none, p, n = [0] * len(turns), spec.num_tokens, self.context_L2GPD.shape[3]
        decoded = num_answer - spec.batch_size
        scored_pairs = pair * pairs(p, none, ends)
        flop = {
            "prompts": layers * num_turn + pair * pairs(p, none, turns) + head * spec.batch_size,
            "decoding": layers * decoded + pair * pairs(p, turns, ends) + head * decoded,
            "teacher": layers * num_scored + pair * pairs(n, none, ends),
            "update": 2 * layers * num_scored + 3 * scored_pairs + 3 * head * num_answer,
        }
        rows = {"prompts": min(num_turn, PREFILL_TOKENS_PER_STEP), "decoding": spec.batch_size}
        return {name: Stage(getattr(self, name), flop[name] / 1e9, rows.get(name, num_scored)) for name in flop}


def training_step(lm: FrozenLM, cartridge: TrainableCartridge, spec: RunSpec) -> TrainingStep:
    return TrainingStep(
        lm,
        cartridge,
        Objective(spec.objective, hard_label_weight=spec.hard_label_weight),
        learning_rate=spec.learning_rate,
        micro_batch_tokens=None,
        policy_mismatch_threshold=spec.policy_mismatch_threshold,
        max_grad_norm=spec.max_grad_norm,
    )


def spec_heads(lm: FrozenLM) -> int:
    """L H D."""
    return lm.spec.num_layers * lm.num_heads * lm.spec.head_dim


def layer_products(lm: FrozenLM) -> list[Any]:
    layers: Any = lm.model.base_model.layers
    return [module for module in layers.modules() if isinstance(module, PackedLinear | torch.nn.Linear)]


def num_weights(lm: FrozenLM) -> int:
    """Of the products of all layers."""
    return sum(each.in_features * each.out_features for each in layer_products(lm))


@torch.inference_mode()
def products_seconds(lm: FrozenLM, rows: int) -> float:
    products = layer_products(lm)
    inputs = {width: torch.randn(rows, width) for width in {each.in_features for each in products}}
    began = time.perf_counter()
    for product in products:
        product(inputs[product.in_features])
    return time.perf_counter() - began


def measure(step: Step, repeats: int) -> dict[str, Any]:
    stages = step.stages()
    layer_gflop = 2e-9 * num_weights(step.lm)
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in stages}
    rates: dict[str, list[float]] = {name: [] for name in stages}
    # The first turn warms up.
    for turn in range(-1, repeats):
        for name, stage in stages.items():
            cpu_began, began = time.process_time(), time.perf_counter()
            stage.work()
            took, cpu_took = time.perf_counter() - began, time.process_time() - cpu_began
            rate = layer_gflop * stage.rows / products_seconds(step.lm, stage.rows)
            if turn >= 0:
                seconds[name].append(took)
                cpu_seconds[name].append(cpu_took)
                rates[name].append(rate)
    return {
        name: {
            "gflop": round(stage.gflop, 1),
            "rows": stage.rows,
            "rate_gflops": round(rate := statistics.median(rates[name]), 1),
            "floor_seconds": round(stage.gflop / rate, 3),
            "seconds": round(statistics.median(seconds[name]), 3),
            "cpu_seconds": round(statistics.median(cpu_seconds[name]), 3),
            "shares": shares(stage.work),
        }
        for name, stage in stages.items()
    }


def shares(work: Callable[[], object]) -> dict[str, float]:
    """Of a stage's seconds: those of kinds of operators, and the rest, which is Python's."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
    found = {"products": 0.0, "attention": 0.0, "others": 0.0}
    for event in profile.key_averages():
        kind = "products" if event.key in PRODUCTS else "attention" if ATTENTION in event.key else "others"
        found[kind] += event.self_cpu_time_total / 1e6 / seconds
    return {name: round(share, 3) for name, share in {**found, "Python": 1 - sum(found.values())}.items()}


def show(stages: dict[str, Any]) -> None:
    columns = ("gflop", "rows", "rate_gflops", "floor_seconds", "seconds", "cpu_seconds")
    print(f"{'':10}" + "".join(f"{name:>15}" for name in (*columns, "products", "attention", "others", "Python")))
    for name, row in stages.items():
        figures = "".join(f"{row[column]:15}" for column in columns)
        print(f"{name:10}{figures}" + "".join(f"{share:15.0%}" for share in row["shares"].values()))
    total, floor = (sum(row[column] for row in stages.values()) for column in ("seconds", "floor_seconds"))
    print(f"all: {total:.2f} s, floor {floor:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    step = Step()
    stages = measure(step, arguments.repeats)
    show(stages)
    result = {
        "processor": processor(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "shapes": {
            "answers": step.spec.batch_size,
            "answer_tokens": step.spec.max_new_tokens,
            "turn_tokens": sum(map(len, step.turns)),
            "cartridge_tokens": step.spec.num_tokens,
            "document_tokens": step.context_L2GPD.shape[3],
        },
        "stages": stages,
    }
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
