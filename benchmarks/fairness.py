"""What one client that asks for very much costs the others: make bench-fairness

Polite clients send short streaming chats one after the other, to a real gateway before a real rollout server. After a
while a hog sends its requests beside them: more prompts than there are places, with the longest answers. How long the
others wait for a first token is compared, calm and beside the hog, round by round in one run.

The hog is let into the queue: with the usual `max_queue_seconds` it would be refused, since it would wait too long.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
from transformers import LlamaConfig, LlamaForCausalLM

from foundry.tasks import end
from tests.process import Process
from tests.services import open_stack, wait_ready, wait_serving
from tests.tiny import build_tokenizer

NUM_POLITE, POLITE_TOKENS = 8, 16
HOG_REQUESTS, HOG_PROMPTS, HOG_TOKENS = 2, 128, 3000
MAX_SEQUENCE_TOKENS = 4096
SETTLE_SECONDS = 3.0
MODEL = "small"
RESULT = Path(__file__).parent / "results" / "fairness.json"


@dataclass
class FirstTokens:
    """Seconds to the first token of each chat, by what went on beside it."""

    calm: list[float] = field(default_factory=list)
    beside_hog: list[float] = field(default_factory=list)


@dataclass
class Phase:
    """Where the time of a chat that begins is put."""

    found: list[float]


def build_model(directory: Path) -> Path:
    """Random weights: what is measured is who waits, not what is said."""
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_SEQUENCE_TOKENS,
    )
    build_tokenizer().save_pretrained(directory)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


async def polite(client: httpx.AsyncClient, number: int, phase: Phase) -> None:
    """Short chats, one after the other, until it is cancelled."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"Is harbour {number} open again?"}],
        "max_tokens": POLITE_TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    while True:
        found, began = phase.found, time.perf_counter()
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.aiter_lines()
            first = await anext(lines)
            found.append(time.perf_counter() - began)
            assert first.startswith("data: {"), first
            async for _ in lines:
                pass


async def hog(client: httpx.AsyncClient) -> None:
    """Takes what it gets, until it is cancelled."""
    body = {
        "model": MODEL,
        "prompt": [f"Tell of harbour {number}." for number in range(HOG_PROMPTS)],
        "max_tokens": HOG_TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            assert line.startswith("data: {") or not line, line


async def measure(gateway: Process, num_rounds: int, seconds: float) -> list[FirstTokens]:
    rounds = []
    async with httpx.AsyncClient(base_url=f"http://{gateway.address}", timeout=600) as client:
        phase = Phase([])
        chats = [asyncio.create_task(polite(client, number, phase)) for number in range(NUM_POLITE)]
        for _ in range(num_rounds):
            # Not measured: until the hog before is gone, and everything has been used once.
            phase.found = []
            await asyncio.sleep(SETTLE_SECONDS)
            found = FirstTokens()
            phase.found = found.calm
            await asyncio.sleep(seconds)
            phase.found = found.beside_hog
            hogs = [asyncio.create_task(hog(client)) for _ in range(HOG_REQUESTS)]
            await asyncio.sleep(seconds)
            for each in (*chats, *hogs):
                assert not each.done(), each.exception()
            await end(*hogs)
            rounds.append(found)
        await end(*chats)
    return rounds


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {"chats": len(seconds), "p50_seconds": round(cuts[49], 4), "p99_seconds": round(cuts[98], 4)}


def row(calm: Sequence[float], beside_hog: Sequence[float]) -> dict[str, Any]:
    found = {"calm": percentiles(calm), "beside_hog": percentiles(beside_hog)}
    return found | {"p99_ratio": round(found["beside_hog"]["p99_seconds"] / found["calm"]["p99_seconds"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, open_stack(Path(directory)) as stack:
        model = build_model(Path(directory) / "models" / MODEL)
        rollout = stack.spawn(
            "rollout",
            *("--model", str(model), "--max-sequence-tokens", str(MAX_SEQUENCE_TOKENS), "--num-threads", "1"),
            *("--max-queue-seconds", "3600"),
        )
        wait_serving(rollout)
        gateway = stack.gateway([rollout])
        wait_ready(gateway)
        rounds = asyncio.run(measure(gateway, arguments.rounds, arguments.seconds))
    rows = [row(each.calm, each.beside_hog) for each in rounds]
    rows.append(row(*(list(chain.from_iterable(each)) for each in zip(*map(astuple, rounds), strict=True))))
    *per_round, together = rows
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "polite": f"{NUM_POLITE} clients, chats of {POLITE_TOKENS} tokens one after the other",
        "hog": f"{HOG_REQUESTS} requests of {HOG_PROMPTS} prompts, {HOG_TOKENS} tokens each",
        "rounds": per_round,
        "together": together,
    }
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    print("| round | calm p50, ms | calm p99, ms | beside the hog p50, ms | beside the hog p99, ms | p99, times |")
    print("|---|---|---|---|---|---|")
    for name, each in zip([*map(str, range(1, len(rows))), "all"], rows, strict=True):
        cells = [each[when][which] for when in ("calm", "beside_hog") for which in ("p50_seconds", "p99_seconds")]
        print(f"| {name} | {' | '.join(f'{1e3 * cell:.0f}' for cell in cells)} | {each['p99_ratio']:.2f} |")


if __name__ == "__main__":
    main()
