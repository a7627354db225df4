"""The built-in engine beside `transformers.generate` on a CPU: python -m benchmarks.generate

The demo's model behind one cartridge, the document's first tokens: greedy answers to prompts of equal length (random
tokens), to their full length. `generate` gets the cartridge as its past, copied for every sequence, as one would write
it; both take turns. Tokens a second are of whole answers, prompts included; ratios are of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from examples.demo import DOCUMENT, processor
from foundry.local.demo_model import resolve_model
from foundry.model.cartridge import TrainableCartridge
from foundry.model.lm import FrozenLM
from foundry.model.template import ChatTemplate
from services.rollout.engine import SamplingParams, SequenceRequest
from services.rollout.engine.torch.engine import TorchEngine

CARTRIDGE_TOKENS, PROMPT_TOKENS, ANSWER_TOKENS = 512, 32, 40
BATCHES = (1, 8, 32)


def random_prompts(batch: int, vocab_size: int) -> Tensor:
    return torch.randint(100, vocab_size, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(batch))


def engine_answers(engine: TorchEngine, prompts_BS: Tensor) -> list[list[int]]:
    sampling = SamplingParams(ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
    engine.admit(
        {
            index: SequenceRequest(tuple(prompt), ("cartridge",), sampling, skip_prefix_cache=True)
            for index, prompt in enumerate(prompts_BS.tolist())
        }
    )
    answers: list[list[int]] = [[] for _ in prompts_BS]
    while engine.stats().num_running or engine.stats().num_waiting:
        for output in engine.step():
            answers[output.sequence_id].append(output.token_id)
    return answers


@torch.inference_mode()
def generate_answers(model: Any, kv_L2GPD: Tensor, prompts_BS: Tensor) -> list[list[int]]:
    batch = len(prompts_BS)
    past = DynamicCache()
    for layer, kv_2GPD in enumerate(kv_L2GPD):
        key, value = (each.expand(batch, *each.shape).contiguous() for each in kv_2GPD)
        past.update(key, value, layer)
    num_past = kv_L2GPD.shape[3]
    # What stands in the past has ids too, which are not looked at.
    ids = torch.cat([torch.zeros(batch, num_past, dtype=torch.long), prompts_BS], dim=1)
    out = model.generate(
        ids,
        past_key_values=past,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=ANSWER_TOKENS,
        min_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    answers: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return answers


def measure(ways: dict[str, Callable[[], list[list[int]]]], batch: int, repeats: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[list[int]]] = {}
    # The first turn warms up.
    for turn in range(-1, repeats):
        for name, answer in ways.items():
            began = time.perf_counter()
            answers[name] = answer()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - began)
    found: dict[str, Any] = {
        f"{name}_tokens_per_second": round(batch * ANSWER_TOKENS / statistics.median(times), 1)
        for name, times in seconds.items()
    }
    ours, theirs = answers.values()
    found["ratio"] = round(statistics.median(seconds["generate"]) / statistics.median(seconds["engine"]), 2)
    found["equal_answers"] = sum(one == other for one, other in zip(ours, theirs, strict=True)) / batch
    print(f"batch {batch}: {found}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "generate.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    directory = resolve_model("demo")
    lm = FrozenLM.load(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    context = ChatTemplate(lm.tokenizer, datetime(2024, 7, 26, tzinfo=UTC)).context(DOCUMENT.read_text())
    cartridge = TrainableCartridge(lm, lm.prefill(context[:CARTRIDGE_TOKENS])).snapshot()
    engine = TorchEngine(
        lm, max_sequences=max(BATCHES), max_sequence_tokens=PROMPT_TOKENS + ANSWER_TOKENS, prefill_tokens_per_step=512
    )
    engine.load("cartridge", cartridge)
    result: dict[str, Any] = {
        "processor": processor(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "batches": {},
    }
    for batch in BATCHES:
        prompts_BS = random_prompts(batch, lm.spec.vocab_size)
        ways: dict[str, Callable[[], list[list[int]]]] = {
            "engine": lambda prompts_BS=prompts_BS: engine_answers(engine, prompts_BS),  # type: ignore[misc]
            "generate": lambda prompts_BS=prompts_BS: generate_answers(model, cartridge.kv_L2GPD, prompts_BS),  # type: ignore[misc]
        }
        result["batches"][batch] = measure(ways, batch, arguments.repeats)
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
