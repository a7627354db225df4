"""The trainer's update on a GPU, against a plain reference in the same run: python -m benchmarks.update

Runs with torch and transformers alone. First the prefix's gradient is compared with a CPU's on a small model; a wrong
one ends the benchmark. Then a model of Llama-3.2-3B's shape with random weights in bfloat16: exact forward KL on
samples of 128 turn and 1024 answer tokens. The reference is what one would write first: layers of `transformers`
compiled one by one, FlexAttention over samples laid end to end, activation checkpointing, and the loss in chunks.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu_swap import build
from benchmarks.shapes import LLAMA_3B
from foundry.model.attention.flex import FlexAttention, Spans, block_mask
from foundry.model.attention.packed import PackedAttention
from foundry.model.cartridge import TrainableCartridge
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective
from services.trainer.sample import Sample
from services.trainer.update.gradient import Batch, Signal, backward
from services.trainer.update.step import TrainingStep

FORWARD = Objective("forward_kl")
TURN_TOKENS, ANSWER_TOKENS = 128, 1024
REFERENCE_MICRO_BATCH, REFERENCE_CHUNK = 32, 1024
# In bfloat16 layers that are not compiled, on a CPU, are off by 0.04.
LARGEST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
# Heads as those of the large one: three of queries to one of keys, of 128 dimensions.
SMALL: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


def samples_of(lengths: Sequence[tuple[int, int]]) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(100, 50_000, (length,), generator=generator).tolist()

    return [
        Sample(ids(turn), (answer_ids := ids(answer)), [0.0] * len(answer_ids), "", 0, False)
        for turn, answer in lengths
    ]


def cartridge_of(lm: FrozenLM, num_tokens: int) -> TrainableCartridge:
    """The same in every dtype and on every device."""
    random = torch.randn(lm.spec.kv_shape(num_tokens), generator=torch.Generator().manual_seed(1))
    return TrainableCartridge(lm, random.bfloat16().to(lm.device))


def signals_of(lm: FrozenLM, samples: Sequence[Sample]) -> list[Signal]:
    """In the host's memory, as they come from a teacher."""
    shape = (max(len(sample.answer_ids) for sample in samples), lm.spec.hidden_size)
    one = torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(lm.dtype)
    return [one.roll(index, 0)[: len(sample.answer_ids)].clone() for index, sample in enumerate(samples)]


def gate(quick: bool) -> dict[str, float]:
    """Relative L2 errors of the prefix's gradient. Raises if ours is too large.

    Of the gradient in float32 on the CPU, where nothing is compiled, with the same weights, prefix and signals: numbers
    of bfloat16.
    """
    lengths = [(17, 200), (128, 300), (5, 30), (100, 28), (1, 1)]
    samples = samples_of(lengths)
    weights = build("cuda", torch.bfloat16, **SMALL).model.state_dict()

    def gradient(device: str, dtype: torch.dtype, plan: Any, micro_batch_tokens: int = 4096) -> Tensor:
        lm = build(device, dtype, weights, **SMALL)
        lm.packed_plan = plan
        cartridge = cartridge_of(lm, 300)
        num_tokens = sum(answer for _, answer in lengths)
        backward(lm, cartridge, Batch(samples, signals_of(lm, samples), FORWARD, num_tokens, micro_batch_tokens))
        assert cartridge.master_L2GRD.grad is not None
        return cartridge.master_L2GRD.grad.double().cpu()

    exact = gradient("cpu", torch.float32, PackedAttention)
    errors = {}
    for dtype, largest in LARGEST_ERROR.items():
        cases = {
            "one micro-batch": (FlexAttention, 4096),
            **({} if quick else {"several": (FlexAttention, 400)}),
            "layers not compiled, for comparison": (PackedAttention, 4096),
        }
        for case, (plan, micro_batch_tokens) in cases.items():
            found = gradient("cuda", dtype, plan, micro_batch_tokens)
            error = ((found - exact).norm() / exact.norm()).item()
            name = f"{str(dtype).removeprefix('torch.')}, {case}"
            errors[name] = error
            print(f"gradient's relative error, {name}: {error:.2e} (at most {largest:.0e})", flush=True)
            assert error < largest or plan is PackedAttention, "the gradient is wrong: nothing is measured"
    return errors


def ours(lm: FrozenLM, num_samples: int, num_prefix: int) -> Callable[[], object]:
    step = TrainingStep(
        lm,
        cartridge_of(lm, num_prefix),
        FORWARD,
        learning_rate=1e-3,
        micro_batch_tokens=None,
        # Nothing was rolled out: there is nothing to prove.
        policy_mismatch_threshold=float("inf"),
    )
    samples = samples_of([(TURN_TOKENS, ANSWER_TOKENS)] * num_samples)
    signals = signals_of(lm, samples)
    return lambda: step.run(samples, signals, prove_policy=True)


def reference(lm: FrozenLM, num_samples: int, num_prefix: int) -> Callable[[], object]:
    return Reference(lm, num_samples, num_prefix).step


class Reference:
    """Adam on a prefix, all that belongs to it written out."""

    def __init__(self, lm: FrozenLM, num_samples: int, num_prefix: int) -> None:
        self.lm, self.num_prefix = lm, num_prefix
        self.master_L2GPD = cartridge_of(lm, num_prefix).cast().detach().float().requires_grad_()
        self.optimiser = torch.optim.Adam([self.master_L2GPD], lr=1e-3)
        self.samples = samples_of([(TURN_TOKENS, ANSWER_TOKENS)] * num_samples)
        self.signals = signals_of(lm, self.samples)
        self.layer = torch.compile(reference_layer, dynamic=False)
        self.block_masks: dict[int, BlockMask] = {}

    def step(self) -> float:
        self.optimiser.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.lm.device)
        for begin in range(0, len(self.samples), REFERENCE_MICRO_BATCH):
            some = slice(begin, begin + REFERENCE_MICRO_BATCH)
            loss = self.loss(self.samples[some], self.signals[some]) / (len(self.samples) * ANSWER_TOKENS)
            loss.backward()
            total += loss.detach()
        self.optimiser.step()
        return total.item()

    def loss(self, samples: Sequence[Sample], signals: Sequence[Signal]) -> Tensor:
        lm, device = self.lm, self.lm.device
        ids_T = torch.tensor([token for sample in samples for token in sample.ids], device=device)
        length = TURN_TOKENS + ANSWER_TOKENS
        positions_T = self.num_prefix + torch.arange(len(ids_T), device=device) % length
        base: Any = lm.model.base_model
        hidden = base.embed_tokens(ids_T[None])
        angles = base.rotary_emb(hidden, position_ids=positions_T[None])
        mask = self.block_mask(len(ids_T), length)
        kv_L2GPD = self.master_L2GPD.to(lm.dtype)
        for layer, (key, value) in zip(base.layers, (kv.unbind(0) for kv in kv_L2GPD.unbind(0)), strict=True):
            hidden = checkpoint(self.layer, layer, hidden, angles, key[None], value[None], mask, use_reentrant=False)
        hidden_NE = base.norm(hidden)[0].view(len(samples), length, -1)[:, TURN_TOKENS - 1 : -1].flatten(0, 1)
        teacher_NE = torch.cat([signal for signal in signals if isinstance(signal, Tensor)]).to(device)
        total = hidden_NE.new_zeros((), dtype=torch.float32)
        for student, teacher in zip(hidden_NE.split(REFERENCE_CHUNK), teacher_NE.split(REFERENCE_CHUNK), strict=True):
            total = total + checkpoint(reference_loss, student, teacher, lm.head_VE, use_reentrant=False)
        return total

    def block_mask(self, num_tokens: int, length: int) -> BlockMask:
        """Made once for all steps, and by our code: torch's takes up to 49 s."""
        if num_tokens not in self.block_masks:
            num_samples = num_tokens // length
            spans = Spans.of([length] * num_samples, [(0, self.num_prefix)] * num_samples, self.num_prefix)
            self.block_masks[num_tokens] = block_mask(spans.to(self.lm.device), self.num_prefix + num_tokens)
        return self.block_masks[num_tokens]


def reference_layer(layer: Any, hidden: Tensor, angles: Any, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    q, k, v = (
        each(normed).view(shape).transpose(1, 2) for each in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    cos, sin = (angle[:, None] for angle in angles)
    q, k = (each * cos + rotated(each) * sin for each in (q, k))
    out = flex_attention(q, torch.cat([key, k], 2), torch.cat([value, v], 2), block_mask=mask, enable_gqa=True)
    assert isinstance(out, Tensor)
    hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def rotated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def reference_loss(student_NE: Tensor, teacher_NE: Tensor, head_VE: Tensor) -> Tensor:
    student = F.log_softmax(F.linear(student_NE, head_VE).float(), dim=-1)
    teacher = F.log_softmax(F.linear(teacher_NE, head_VE).float(), dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def measure(work: Callable[[], object], repeats: int) -> dict[str, float]:
    """Seconds of the first step, and the median of `repeats` more; peak memory of these, weights included."""
    times = []
    for index in range(repeats + 1):
        if index == 1:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return {
        "first_step_seconds": times[0],
        "seconds": sorted(times[1:])[(repeats - 1) // 2],
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer gates, and 32 and 128 samples behind 2048 tokens")
    parser.add_argument("--no-reference", action="store_true")
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "update.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(result["device"])
    result["gradient_errors"] = gate(arguments.quick)
    # Code compiled for the small models would count towards how often one function may be compiled.
    torch.compiler.reset()
    lm = build("cuda", torch.bfloat16, max_position_embeddings=131072, **LLAMA_3B)
    cases = (
        [(32, 2048), (128, 2048)] if arguments.quick else [(32, 2048), (8, 2048), (128, 2048), (32, 128), (32, 8192)]
    )
    result["rows"] = []
    print(f"{'':10}{'samples':>8}{'prefix':>8}{'seconds':>9}{'tokens/s':>10}{'peak GB':>9}{'first step, s':>15}")
    for num_samples, num_prefix in cases:
        sides = {"ours": ours}
        # A reference in micro-batches of 32 takes four times as long for 128: not measured again.
        if not arguments.no_reference and num_samples == 32:
            sides["reference"] = reference
        for name, make in sides.items():
            gc.collect()
            torch.cuda.empty_cache()
            row = measure(make(lm, num_samples, num_prefix), 3 if num_samples <= 32 else 1)
            result["rows"].append({"name": name, "samples": num_samples, "prefix_tokens": num_prefix, **row})
            rate = num_samples * (TURN_TOKENS + ANSWER_TOKENS) / row["seconds"]
            print(
                f"{name:10}{num_samples:8}{num_prefix:8}{row['seconds']:9.3f}{rate:10.0f}{row['peak_gb']:9.2f}"
                f"{row['first_step_seconds']:15.1f}",
                flush=True,
            )
            arguments.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
