"""What the gateway adds to a rollout server, and what it bears: make bench-gateway

Every part is a process of its own on the same cores: Valkey, a rollout server, the gateway, and who asks
(benchmarks/load.py). Chats are greedy, streamed, and name a cartridge that is in the store.

first token   Chats come at random times (Poisson, fixed seed), as many a second by each way: blocks through the gateway
              take turns with blocks over the rollout's own gRPC, with the same times and prompts. A chat's time runs
              from when it was due; over HTTP to the first event with content. What is added is the difference of the
              two ways' percentiles. The rollout is benchmarks/paced_rollout.py, which answers at a fixed pace: an
              engine on these cores would make both ways wait for it, and by its steps differ more than they do.
streams       So many answers of the real rollout service, with the tests' tiny model, are read at once. The gateway's
              resident memory before, at most meanwhile, and after.
overload      The same service with few places. First each prompt alone, then as many clients as there are places, one
              chat after the other: so many chats are answered a second. Then chats come at twice that rate. Of those
              that are not refused with 429, how many don't end with a finish_reason and [DONE], and how many have other
              tokens than alone?
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.load import NUM_PROMPTS, Answer, Grpc, Http, open_loop
from examples.demo import processor
from foundry.tasks import end
from foundry.v1 import common_pb2
from tests.process import Process
from tests.services import Stack, open_stack, wait_ready, wait_serving

RESULT = Path(__file__).parent / "results" / "gateway.json"
NAME = "harbour"
RATE, ANSWER_TOKENS, BLOCK_SECONDS = 50.0, 16, 3.0
NUM_STREAMS, STREAM_TOKENS = 500, 200
PLACES, OVERLOAD_TOKENS, CLOSED_SECONDS, MAX_QUEUE_SECONDS = 16, 64, 8.0, 2.0
T = TypeVar("T")


@dataclass(frozen=True)
class Servers:
    """What is measured, for the process that asks."""

    gateway: str
    gateway_pid: int
    rollout: str
    digest: str

    def http(self) -> Http:
        return Http(self.gateway, NAME)

    def grpc(self) -> Grpc:
        return Grpc(self.rollout, common_pb2.CartridgeId(name=NAME, version=1, digest=self.digest))

    def cpu_seconds(self) -> float:
        """That the gateway has taken."""
        fields = Path(f"/proc/{self.gateway_pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        """Of the gateway."""
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.gateway_pid}/status").read_text())
        assert found is not None
        return int(found[1]) * 1024


async def first_tokens(servers: Servers, num_blocks: int) -> dict[str, Any]:
    http, grpc = servers.http(), servers.grpc()
    await grpc.open()
    found: dict[str, list[Answer]] = {"gateway": [], "grpc": []}
    cpu_seconds = 0.0
    # The first block warms up.
    for block in range(-1, num_blocks):
        ways: tuple[tuple[str, Http | Grpc], ...] = (("gateway", http), ("grpc", grpc))
        for name, way in ways:
            cpu_began = servers.cpu_seconds()
            ask = partial(way.chat, num_tokens=ANSWER_TOKENS)
            answers = await open_loop(ask, RATE, BLOCK_SECONDS, seed=block + 1)
            assert all(answer.is_whole and len(answer.ids) == ANSWER_TOKENS for answer in answers), answers
            if block >= 0:
                found[name] += answers
                cpu_seconds += servers.cpu_seconds() - cpu_began if way is http else 0.0
    http.close()
    await grpc.close()
    rows = {name: percentiles([answer.first_token_seconds for answer in each]) for name, each in found.items()}
    rows["added"] = {name: round(rows["gateway"][name] - rows["grpc"][name], 2) for name in rows["grpc"]}
    chats = found["gateway"]
    return {
        "rate_per_second": RATE,
        "answer_tokens": ANSWER_TOKENS,
        "chats_each_way": len(chats),
        "first_token_milliseconds": rows,
        "gateway_cpu_milliseconds_per_chat": round(1e3 * cpu_seconds / len(chats), 2),
        "chunks_per_chat": round(statistics.mean(answer.num_chunks for answer in chats), 1),
    }


async def streams(servers: Servers) -> dict[str, Any]:
    http = servers.http()
    before = servers.resident_bytes()
    asked = asyncio.gather(*(http.chat(number, 0.0, STREAM_TOKENS) for number in range(NUM_STREAMS)))
    most_open = most_bytes = 0
    while not asked.done():
        most_open = max(most_open, http.num_open)
        most_bytes = max(most_bytes, servers.resident_bytes())
        await asyncio.sleep(0.05)
    answers = await asked
    http.close()
    return {
        "streams": NUM_STREAMS,
        "open_at_once": most_open,
        "whole": sum(is_whole(answer) for answer in answers),
        "resident_megabytes": {
            "before": round(before / 1e6),
            "most": round(most_bytes / 1e6),
            "after": round(servers.resident_bytes() / 1e6),
        },
    }


async def overload(servers: Servers, seconds: float) -> dict[str, Any]:
    http = servers.http()

    ask = partial(http.chat, num_tokens=OVERLOAD_TOKENS)
    calm = [await ask(number, 0.0) for number in range(NUM_PROMPTS)]
    assert all(map(is_whole, calm)), calm
    sustained = await closed_loop(ask)
    answers = await open_loop(ask, 2 * sustained, seconds, seed=0)
    http.close()
    taken = [answer for answer in answers if answer.status == 200]
    waited = [answer.first_token_seconds for answer in taken if answer.first_token_seconds]
    return {
        "sustained_per_second": round(sustained, 1),
        "sent_per_second": round(2 * sustained, 1),
        "seconds": seconds,
        "answer_tokens": OVERLOAD_TOKENS,
        "statuses": dict(sorted(Counter(str(answer.status) for answer in answers).items())),
        "errors": sorted({answer.error for answer in answers if answer.error}),
        "dropped": sum(not is_whole(answer) for answer in taken),
        "unequal": sum(
            answer.ids != calm[number % NUM_PROMPTS].ids
            for number, answer in enumerate(answers)
            if answer.status == 200
        ),
        "first_token_milliseconds": percentiles(waited),
    }


async def closed_loop(ask: Callable[[int, float], Coroutine[Any, Any, Answer]]) -> float:
    """Chats a second of as many clients as there are places."""
    num_answered = 0

    async def client(number: int) -> None:
        nonlocal num_answered
        while True:
            answer = await ask(number, 0.0)
            assert is_whole(answer), answer
            num_answered += 1

    clients = [asyncio.create_task(client(number)) for number in range(PLACES)]
    await asyncio.sleep(1)
    before, began = num_answered, time.perf_counter()
    await asyncio.sleep(CLOSED_SECONDS)
    rate = (num_answered - before) / (time.perf_counter() - began)
    await end(*clients)
    return rate


def is_whole(answer: Answer) -> bool:
    return answer.status == 200 and answer.is_whole and bool(answer.finish_reason)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50": round(1e3 * cuts[49], 2), "p99": round(1e3 * cuts[98], 2)}


def run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    # As the gateway does, so that nobody's collection is measured.
    gc.freeze()
    return asyncio.run(work())


def measure(stack: Stack, num_blocks: int, seconds: float) -> dict[str, Any]:
    digest = stack.publish(NAME, stack.cartridge(1))[0].digest
    found = {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        for name, work, start in (
            ("first_token", partial(first_tokens, num_blocks=num_blocks), paced),
            ("streams", streams, partial(real, num_places=NUM_STREAMS)),
            ("overload", partial(overload, seconds=seconds), partial(real, num_places=PLACES)),
        ):
            rollout = start(stack)
            wait_serving(rollout)
            # Its own interpreter: a fork would count what it shares as its memory.
            gateway = stack.spawn(
                "gateway", "--rollout-addresses", rollout.address, "--keep-alive-seconds", "600", python=sys.executable
            )
            wait_ready(gateway)
            servers = Servers(gateway.address, gateway.pid, rollout.address, digest)
            found[name] = process.submit(run, partial(work, servers)).result()
            gateway.stop()
            rollout.stop()
    return found


def paced(stack: Stack) -> Process:
    return stack.spawn("rollout", module="benchmarks.paced_rollout", python=sys.executable)


def real(stack: Stack, num_places: int) -> Process:
    return stack.rollout(
        *("--max-sequences", str(num_places), "--max-sequence-tokens", "512", "--num-threads", "1"),
        *("--max-queue-seconds", str(MAX_QUEUE_SECONDS)),
    )


def goals(found: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """What is shown, the goal, what was found, and whether that is enough."""
    added, open_, over = found["first_token"]["first_token_milliseconds"]["added"], found["streams"], found["overload"]
    most, statuses = open_["resident_megabytes"]["most"], over["statuses"]
    all_open = open_["open_at_once"] == open_["whole"] == NUM_STREAMS
    return [
        ("first token, added p50", "3 ms", f"{added['p50']:.1f} ms", added["p50"] <= 3),
        ("first token, added p99", "10 ms", f"{added['p99']:.1f} ms", added["p99"] <= 10),
        (f"{NUM_STREAMS} open streams, memory", "500 MB", f"{most} MB", most < 500 and all_open),
        ("overload, statuses", "200, 429", ", ".join(statuses), set(statuses) == {"200", "429"}),
        ("overload, dropped streams", "0", str(over["dropped"]), not over["dropped"]),
        ("overload, answers unlike calm ones", "0", str(over["unequal"]), not over["unequal"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=10, help=f"of {BLOCK_SECONDS:g} s, by each way")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory, open_stack(Path(directory)) as stack:
        found = measure(stack, arguments.blocks, arguments.seconds)
    # Of what else runs there, times tell too.
    machine = {"processor": processor(), "num_cores": os.cpu_count(), "load_before": round(load, 1)}
    arguments.result.write_text(json.dumps(machine | found, indent=1) + "\n")
    print("| | goal | found | |")
    print("|---|---|---|---|")
    for name, goal, value, is_met in goals(found):
        print(f"| {name} | {goal} | {value} | {'met' if is_met else 'missed'} |")


if __name__ == "__main__":
    main()
