"""One strict on-policy step on a GPU, through the product as a user starts it: python -m benchmarks.step

`foundry up`'s own stack (Valkey, rollout, teacher, trainer, gateway: a process each, RPC on loopback) runs on one GPU
with a model of Llama-3.2-3B's shape with random weights in bfloat16. A run trains a 2048-token cartridge for a document
of 12k tokens: 32 answers of 1024 tokens to prompts of 125 to 128 in every step, exact forward KL. Every step is proved.
Then another run does the same with the next `max_staleness`.

What is reported comes from the run's own events: seconds of each stage, and between the ends of steps; how far the
servers' logprobs were from the trainer's. The first two steps may compile and are not counted.

Floors on an H200 (4.3 TB/s and 790 TFLOP/s as measured): each decoding step reads 6.4 GB of weights, 0.23 GB of the
cartridge and on average 2.5 GB of the answers' KV: 2.1 ms, 2.2 s for 1024 of them. The teacher computes 0.37e15 FLOP
behind 12k tokens: 0.5 s. The update computes 0.58e15: 0.74 s. A version is 235 MB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import LLAMA_3B, TINY, build_model
from foundry.client import FoundryClient
from foundry.local.stack import LocalStack
from tests.tiny import build_tokenizer

NUM_SAMPLES, TURN_TOKENS, ANSWER_TOKENS = 32, 128, 1024
CARTRIDGE_TOKENS, DOCUMENT_TOKENS = 2048, 12_288
_WORDS = ("treaty", "harbour", "price", "grain", "spring", "union", "message", "congress", "answer", "document")


def text_of(num_tokens: int, seed: int) -> str:
    """Words of so many tokens."""
    draw, tokenizer = random.Random(seed), build_tokenizer()
    tokens = {word: len(tokenizer.encode(" " + word)) for word in _WORDS}
    words: list[str] = []
    while num_tokens > 0:
        words.append(draw.choice(_WORDS))
        num_tokens -= tokens[words[-1]]
    return " ".join(words)


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    longest = arguments.document_tokens + TURN_TOKENS + 2 * arguments.answer_tokens
    return {
        "FOUNDRY_DEVICE": arguments.device,
        "FOUNDRY_DTYPE": "bfloat16" if arguments.device == "cuda" else "float32",
        "FOUNDRY_MAX_SEQUENCES": str(arguments.samples),
        # The held-out answer is written with the whole document in the prompt.
        "FOUNDRY_MAX_SEQUENCE_TOKENS": str(longest),
        "FOUNDRY_PREFILL_TOKENS_PER_STEP": "2048",
    }


def train(client: FoundryClient, arguments: argparse.Namespace, max_staleness: int) -> list[dict[str, Any]]:
    """Events of the steps, each with the second at which it came."""
    document = client.documents.create(text_of(arguments.document_tokens, 0), title="document")
    prompts, heldout = (
        client.documents.create("\n".join(json.dumps({"prompt": text_of(TURN_TOKENS - 15, seed)}) for seed in seeds))
        for seeds in (range(1, 1 + 2 * arguments.samples), range(1000, 1001))
    )
    run = client.runs.create(
        name=f"step-{max_staleness}",
        document=document["digest"],
        prompts={"kind": "document", "digest": prompts["digest"]},
        heldout={"kind": "document", "digest": heldout["digest"]},
        init="first_tokens",
        mode="on",
        num_tokens=arguments.cartridge_tokens,
        num_steps=arguments.steps,
        batch_size=arguments.samples,
        max_new_tokens=arguments.answer_tokens,
        general_share=0,
        heldout_every=0,
        **({"max_staleness": max_staleness} if max_staleness else {}),
    )
    steps = []
    for event in client.runs.events(run["id"]):
        if event["type"] == "step":
            steps.append(event | {"came_at": time.perf_counter()})
            print({key: event[key] for key in ("step", "tokens", "policy_mismatch_kl", "seconds")}, flush=True)
    ended = client.runs.get(run["id"])
    if ended["state"] != "succeeded":
        raise SystemExit(f"the run {ended['state']}: {ended['error']}")
    return steps


def figures(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    counted = steps[2:]
    between = [later["came_at"] - earlier["came_at"] for earlier, later in zip(steps[1:], counted, strict=False)]
    stages = counted[0]["seconds"]
    return {
        "steps": len(counted),
        "first_steps_seconds": [step["seconds"] for step in steps[:2]],
        "tokens": statistics.median(step["tokens"] for step in counted),
        "seconds": {name: round(statistics.median(step["seconds"][name] for step in counted), 3) for name in stages},
        "seconds_between_steps": round(statistics.median(between), 3),
        "policy_mismatch_kl": [step["policy_mismatch_kl"] for step in steps],
        "policy_mismatch_max": [step["policy_mismatch_max"] for step in steps],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the program")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES)
    parser.add_argument("--answer-tokens", type=int, default=ANSWER_TOKENS)
    parser.add_argument("--cartridge-tokens", type=int, default=CARTRIDGE_TOKENS)
    parser.add_argument("--document-tokens", type=int, default=DOCUMENT_TOKENS)
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="for the model's files and the store")
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "step.json")
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "runs": {}}
    os.environ.update(environment(arguments))
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        shape, num_positions = (TINY if arguments.small else LLAMA_3B), 2 * arguments.document_tokens + 4096
        # In a process of its own, so that none of the GPU's memory stays with this one.
        building = multiprocessing.get_context("spawn").Process(
            target=build_model, args=(Path(directory) / "model", arguments.device, shape, num_positions)
        )
        building.start()
        building.join()
        began = time.perf_counter()
        with (
            LocalStack(Path(directory) / "home", str(Path(directory) / "model")) as stack,
            FoundryClient(stack.url) as client,
        ):
            result["start_seconds"] = round(time.perf_counter() - began, 1)
            try:
                for max_staleness in arguments.staleness:
                    print(f"max_staleness {max_staleness}", flush=True)
                    found = figures(train(client, arguments, max_staleness))
                    result["runs"][f"max_staleness {max_staleness}"] = found
                    print(json.dumps(found, indent=2), flush=True)
                    arguments.result.write_text(json.dumps(result, indent=2) + "\n")
            except BaseException:
                for log in stack.home.logs.glob("*.log"):
                    print(f"== {log.name}\n{log.read_text()[-3000:]}", flush=True)
                raise


if __name__ == "__main__":
    main()
