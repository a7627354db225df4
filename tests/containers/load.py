"""What the suites do through the gateway: train a small cartridge, and stream answers while things are torn down."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foundry.client import FoundryClient

# The head of the demo's document: enough for a cartridge of 64 tokens, and scored in a second.
DOCUMENT = (Path(__file__).parents[2] / "examples" / "handbook.md").read_text()[:1500]
QUESTION = "Who designed the Skerrow Fog Mill?"


def small_run(name: str, **changes: Any) -> dict[str, Any]:
    """A run of the demo model that takes about a minute on two cores."""
    return {
        "name": name,
        "text": DOCUMENT,
        "num_tokens": 64,
        "mode": "on",
        "num_steps": 4,
        "batch_size": 4,
        "max_new_tokens": 16,
        "prompts": {"kind": "selfstudy", "num_prompts": 4, "max_prompt_tokens": 32},
        "durable_every": 2,
        "checkpoint_every": 1,
        **changes,
    }


def wait_for_step(client: FoundryClient, run_id: str, step: int) -> dict[str, Any]:
    """The run's event of its `step`-th optimiser step."""
    for event in client.runs.events(run_id):
        if event["type"] == "step" and event["step"] >= step:
            return {**event}
        assert event["type"] != "finished", event
    raise AssertionError(f"{run_id} ended before step {step}")


@dataclass
class Streams:
    """What became of the streams: `tokens` of all, `failures` in words."""

    completed: int = 0
    tokens: int = 0
    failures: list[str] = field(default_factory=list)
    longest_gap_seconds: float = 0.0
    longest_seconds: float = 0.0


@contextmanager
def streaming(url: str, model: str, *, clients: int = 3, max_tokens: int = 24) -> Iterator[Streams]:
    """`clients` threads that stream one answer after another until the block ends; then those in flight complete."""
    streams, lock, over = Streams(), threading.Lock(), threading.Event()

    def stream() -> None:
        with FoundryClient(url, timeout_seconds=300) as client:
            while not over.is_set():
                began = last = time.monotonic()
                gap = 0.0
                try:
                    answer = client.stream_chat(model, QUESTION, max_tokens=max_tokens, ignore_eos=True)
                    for _ in answer:
                        gap, last = max(gap, time.monotonic() - last), time.monotonic()
                    assert answer.answer is not None
                    assert answer.answer.completion_tokens == max_tokens
                except Exception as error:
                    with lock:
                        streams.failures.append(f"after {time.monotonic() - began:.0f} s: {error!r}")
                else:
                    with lock:
                        streams.completed += 1
                        streams.tokens += max_tokens
                        streams.longest_gap_seconds = max(streams.longest_gap_seconds, gap)
                        streams.longest_seconds = max(streams.longest_seconds, last - began)

    threads = [threading.Thread(target=stream) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield streams
    finally:
        over.set()
        for thread in threads:
            thread.join()
