"""What prompts that can't fit cost those who are being answered: make bench-oversized

Streams run the whole time: first alone, then beside a client that sends 1.45 million characters again and again. How
long does it wait for its refusal, and how long at most does a stream wait for its next chunk?
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from foundry.client import FoundryClient
from tests.services import open_stack, wait_ready, wait_serving

RESULT = Path(__file__).parent / "results" / "oversized.json"
MODEL, NUM_CHARACTERS = "tiny", 1_450_000
TEXTS = {
    "nothing": "",
    "words": "The harbour is open again, said the mayor. ",
    "spaces": " ",
    "control tokens": "<|im_end|>",
    "two-byte letters": "é",
}


class Streams:
    """Answers, one after the other on each stream; `longest` is the longest time between two chunks of one."""

    def __init__(self, url: str, num: int) -> None:
        self._url, self._stop = url, threading.Event()
        self.longest = 0.0
        self._threads = ThreadPoolExecutor(num)
        self._running = [self._threads.submit(self._stream) for _ in range(num)]

    def close(self) -> None:
        self._stop.set()
        for each in self._running:
            each.result()

    def _stream(self) -> None:
        with FoundryClient(self._url) as client:
            while not self._stop.is_set():
                # The first chunk waits for a place.
                last = float("inf")
                for _ in client.stream_chat(MODEL, "Go on.", max_tokens=400, ignore_eos=True):
                    now = time.perf_counter()
                    self.longest, last = max(self.longest, now - last), now


def send(url: str, text: str, seconds: float) -> list[float]:
    """How long each refusal took, one after the other."""
    content = (text * NUM_CHARACTERS)[:NUM_CHARACTERS]
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": content}]}, ensure_ascii=False).encode()
    taken, end = [], time.monotonic() + seconds
    with httpx.Client(base_url=url, trust_env=False, timeout=120) as client:
        while time.monotonic() < end:
            began = time.perf_counter()
            answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
            taken.append(time.perf_counter() - began)
            assert answer.status_code == 400, answer.text
    return taken


def measure(url: str, text: str, num_streams: int, seconds: float) -> dict[str, Any]:
    streams = Streams(url, num_streams)
    # A process of its own: in ours it would hold up who reads the streams.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(time.sleep, 2).result()
        streams.longest = 0.0
        taken = process.submit(*((send, url, text, seconds) if text else (time.sleep, seconds))).result()
        found: dict[str, Any] = {"longest_gap_seconds": round(streams.longest, 4)}
    streams.close()
    if taken:
        found |= {"refused": len(taken), "median_seconds": statistics.median(taken), "longest_seconds": max(taken)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0, help="with each kind of text")
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory, open_stack(Path(directory)) as stack:
        rollout = stack.rollout("--model-name", MODEL, "--max-sequences", str(arguments.streams))
        gateway = stack.gateway([rollout])
        wait_serving(rollout)
        wait_ready(gateway)
        url = f"http://{gateway.address}"
        rows = {name: measure(url, text, arguments.streams, arguments.seconds) for name, text in TEXTS.items()}
    # Of what else runs there, gaps tell too.
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load before {load:.1f}"
    result = {"machine": machine, "characters": NUM_CHARACTERS, "streams": arguments.streams, "beside": rows}
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    print("| beside | refused | median, ms | longest, ms | longest gap of a stream, ms |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row.get('refused', 0)} | {1e3 * row.get('median_seconds', 0):.0f} | "
            f"{1e3 * row.get('longest_seconds', 0):.0f} | {1e3 * row['longest_gap_seconds']:.0f} |"
        )


if __name__ == "__main__":
    main()
