"""How long a new version takes from the end of a training step to its first token: make bench-sync

A cartridge of Llama-3.2-3B's shape (28 layers, 8 kv heads, head_dim 128, 2048 tokens, bf16: 234.9 MB) goes from the
trainer's master through a real Valkey to real rollout servers on loopback. The model around it is as narrow as its KV
allows, so that what is measured is the way and not the matrix products.

In the same run, round by round: the floor (what any way must do: copy and hash the bytes at either end, and decode the
first token), the stages, the stall of sequences in flight, the memory at its peak, and what `torch.save` into a shared
folder and loading it again costs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foundry.buffers import allocate
from foundry.identity import CartridgeBytes, digest_of
from foundry.model.cartridge import TrainableCartridge
from foundry.model.lm import FrozenLM
from foundry.rpc.channel import open_channel, wait_until_serving
from foundry.store import CartridgeId, CartridgeStore, ManifestDraft, StoreSettings
from foundry.v1 import common_pb2, rollout_pb2, rollout_pb2_grpc
from tests.process import Process
from tests.services import metric
from tests.tiny import build_tokenizer
from tests.valkey import Valkey

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, NUM_TOKENS = 28, 8, 128, 2048
NAME, RUN = "sync", "bench"
PROMPT_IDS = (5, 6, 7, 8)
NUM_STREAMS = 4
STREAM_TOKENS = 200
RESULT = Path(__file__).parent / "results" / "sync.json"


@dataclass
class Rounds:
    """Seconds of each round, by what was measured."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    async def time(self, name: str, work: Callable[[], Awaitable[Any]]) -> Any:
        began = time.perf_counter()
        result = await work()
        self.add(name, time.perf_counter() - began)
        return result

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])


# The parts of the bench


def build_model(directory: Path) -> Path:
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_KV_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=8192,
        eos_token_id=2,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    build_tokenizer().save_pretrained(directory)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


class Reader:
    """A rollout server and a client of it."""

    def __init__(self, lm: FrozenLM, model: Path, store: StoreSettings, directory: Path, budget_bytes: int) -> None:
        self.fingerprint = lm.spec.fingerprint
        environment = {
            "FOUNDRY_STORE__REDIS_URL": store.redis_url.get_secret_value(),
            "FOUNDRY_STORE__OBJECTS_URL": store.objects_url,
        }
        arguments = ["--model", str(model), "--dtype", "bfloat16", "--max-sequences", "8"]
        arguments += ["--max-sequence-tokens", "512", "--cartridge-budget-bytes", str(budget_bytes)]
        self.process = Process("rollout", arguments, directory, environment)

    async def start(self) -> None:
        self.process.start()
        self.channel = open_channel(self.process.address)
        await wait_until_serving(self.channel, self.process.address, timeout_seconds=120)
        self.stub: rollout_pb2_grpc.RolloutAsyncStub = rollout_pb2_grpc.RolloutStub(self.channel)

    async def first_token(self, version: CartridgeId) -> None:
        async for chunk in self.stub.Generate(generate(self.fingerprint, version, 1), timeout=120):
            assert chunk.identity.cartridges[0].digest == version.digest
            return

    def fetch_seconds(self) -> float:
        return metric(self.process.metrics, "foundry_cartridge_fetch_seconds_sum")

    async def close(self) -> None:
        await self.channel.close()
        self.process.close()


def generate(fingerprint: str, version: CartridgeId, num_tokens: int) -> rollout_pb2.GenerateRequest:
    return rollout_pb2.GenerateRequest(
        model_fingerprint=fingerprint,
        token_ids=common_pb2.TokenIds(ids=PROMPT_IDS),
        cartridges=[common_pb2.CartridgeId(name=NAME, version=version.version, digest=version.digest)],
        sampling=rollout_pb2.Sampling(temperature=0, max_new_tokens=num_tokens, ignore_eos=True),
        skip_prefix_cache=True,
    )


class Publisher:
    """The trainer's end: the fp32 master, and the store."""

    def __init__(self, lm: FrozenLM, store: CartridgeStore) -> None:
        shape = (NUM_LAYERS, 2, NUM_KV_HEADS, NUM_TOKENS, HEAD_DIM)
        generator = torch.Generator().manual_seed(1)
        self.cartridge = TrainableCartridge(lm, torch.randn(shape, generator=generator), dtype=torch.bfloat16)
        self._store = store
        self.step = 0

    async def begin(self) -> CartridgeId:
        await self._store.acquire(NAME, RUN, 1)
        return await self.publish(self.snapshot())

    def train(self) -> None:
        self.step += 1
        with torch.no_grad():
            self.cartridge.master_L2GRD[0, 0, 0] += 0.01

    def snapshot(self) -> CartridgeBytes:
        return self.cartridge.snapshot().to_bytes()

    async def publish(self, stored: CartridgeBytes, *, durable: bool = False) -> CartridgeId:
        draft = ManifestDraft(name=NAME, run=RUN, attempt=1, step=self.step)
        return (await self._store.publish(stored, draft, durable=durable)).id


class NaiveReader:
    """A process that loads what it is told to from a shared folder, as a script of one afternoon would."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_load_for_ever, args=(theirs,), daemon=True)
        self._process.start()
        self._pipe.recv()

    def sync(self, cartridge: TrainableCartridge) -> None:
        kv = cartridge.cast().detach()
        path = self._folder / "cartridge.pt"
        torch.save({"keys": list(kv[:, 0]), "values": list(kv[:, 1])}, path)
        self._pipe.send(str(path))
        self._pipe.recv()

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _load_for_ever(pipe: Connection) -> None:
    pipe.send("ready")
    while True:
        loaded = torch.load(pipe.recv(), weights_only=True)
        torch.stack([torch.stack(loaded["keys"]), torch.stack(loaded["values"])], dim=1)
        pipe.send("loaded")


def _stream(address: str, request: rollout_pb2.GenerateRequest, pipe: Connection) -> None:
    """In a process of its own, so that nothing but the server delays what it sees: when each token came."""

    async def follow(stub: Any, request: rollout_pb2.GenerateRequest) -> list[float]:
        return [time.perf_counter() async for chunk in stub.Generate(request, timeout=600) for _ in chunk.ids]

    async def main() -> list[list[float]]:
        channel = open_channel(address)
        stub = rollout_pb2_grpc.RolloutStub(channel)
        pipe.send("ready")
        pipe.recv()
        times = await asyncio.gather(*(follow(stub, request) for _ in range(NUM_STREAMS)))
        await channel.close()
        return times

    pipe.send(asyncio.run(main()))


# What is measured


async def floors(rounds: Rounds, stored: CartridgeBytes, warm: memoryview) -> None:
    async def copy() -> None:
        warm[:] = stored.data

    async def hash_() -> None:
        digest_of(stored.header, [stored.data])

    await rounds.time("copy", copy)
    await rounds.time("hash", hash_)


async def one_round(rounds: Rounds, publisher: Publisher, readers: Sequence[Reader], warm: memoryview) -> None:
    publisher.train()
    fetched = [reader.fetch_seconds() for reader in readers]
    began = time.perf_counter()
    stored = publisher.snapshot()
    rounds.add("snapshot", time.perf_counter() - began)
    version = await rounds.time("publish", lambda: publisher.publish(stored))
    asked = time.perf_counter()
    await asyncio.gather(*(reader.first_token(version) for reader in readers))
    ended = time.perf_counter()
    rounds.add("request to first token", ended - asked)
    rounds.add("total", ended - began)
    after = [reader.fetch_seconds() for reader in readers]
    rounds.add("fetch", max(b - a for a, b in zip(fetched, after, strict=True)))
    await rounds.time("first token when resident", lambda: readers[0].first_token(version))
    await floors(rounds, stored, warm)


async def stalls(publisher: Publisher, reader: Reader, version: CartridgeId, num_swaps: int) -> dict[str, float]:
    """Gaps between tokens of sequences in flight, with and without versions that come in beside them."""
    gaps: dict[str, list[float]] = {"calm": [], "swapping": []}
    for kind in ("calm", "swapping") * num_swaps:
        pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        arguments = (reader.process.address, generate(reader.fingerprint, version, STREAM_TOKENS), theirs)
        process = context.Process(target=_stream, args=arguments)
        process.start()
        await asyncio.to_thread(pipe.recv)
        pipe.send("go")
        if kind == "swapping":
            publisher.train()
            newer = await publisher.publish(publisher.snapshot())
            await reader.first_token(newer)
        times = await asyncio.to_thread(pipe.recv)
        process.join()
        for each in times:
            # The first tokens wait for the prompts.
            gaps[kind] += [b - a for a, b in pairwise(each[1:])]
    return {
        "calm_median_seconds": statistics.median(gaps["calm"]),
        "calm_largest_seconds": max(gaps["calm"]),
        "swapping_median_seconds": statistics.median(gaps["swapping"]),
        "swapping_largest_seconds": max(gaps["swapping"]),
    }


class Memory:
    """The most memory that a process takes, beyond what it has now."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        self._before = self._read("VmRSS")

    def peak_bytes(self) -> int:
        return self._read("VmHWM") - self._before

    def _read(self, name: str) -> int:
        line = next(line for line in self._status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024


async def bench(directory: Path, num_readers: int, num_rounds: int, *, full: bool) -> dict[str, Any]:
    model = build_model(directory / "model")
    lm = FrozenLM.load(model, dtype="bfloat16")
    valkey = Valkey(directory)
    await valkey.start()
    settings = StoreSettings.model_validate(
        {"redis_url": valkey.url, "objects_url": f"file://{directory}/objects", "keep_hot": 2}
    )
    store = await CartridgeStore.open(settings)
    publisher = Publisher(lm, store)
    num_bytes = publisher.cartridge.header.num_bytes
    readers = [Reader(lm, model, settings, directory, int(2.5 * num_bytes)) for _ in range(num_readers)]
    naive = NaiveReader(directory)
    rounds = Rounds()
    result: dict[str, Any] = {"num_readers": num_readers, "num_rounds": num_rounds, "num_bytes": num_bytes}
    try:
        await asyncio.gather(*(reader.start() for reader in readers))
        warm = allocate(num_bytes)
        warm[:] = bytes(num_bytes)
        # Before the first version: what is measured is all that versions take.
        memory = [Memory(os.getpid()), *(Memory(reader.process.pid) for reader in readers)]
        first = await publisher.begin()
        await asyncio.gather(*(reader.first_token(first) for reader in readers))
        await one_round(Rounds(), publisher, readers, warm)  # warms what is made once
        for _ in range(num_rounds):
            await one_round(rounds, publisher, readers, warm)
        peaks = [each.peak_bytes() / num_bytes for each in memory]
        # A reader has the version that sequences decode with, besides the one that comes.
        result["peak_extra_memory_in_cartridges"] = {"trainer": peaks[0], "reader": max(peaks[1:]) - 1}
        for _ in range(num_rounds):
            publisher.train()
            await rounds.time("torch.save and load", lambda: asyncio.to_thread(naive.sync, publisher.cartridge))
        if full:
            publisher.train()
            durable = Rounds()
            stored = publisher.snapshot()
            version = await durable.time("durable", lambda: publisher.publish(stored, durable=True))
            result["durable_publish_seconds"] = durable.median("durable")
            await readers[0].first_token(version)
            result["stall"] = await stalls(publisher, readers[0], version, 3)
    finally:
        naive.close()
        for reader in readers:
            await reader.close()
        await store.close()
        valkey.close()
    return result | summary(rounds, num_readers)


def summary(rounds: Rounds, num_readers: int) -> dict[str, Any]:
    seconds = {name: rounds.median(name) for name in rounds.values}
    # The trainer and each reader must touch every byte, and all of them share this machine.
    floor = (1 + num_readers) * (seconds["copy"] + seconds["hash"]) + seconds["first token when resident"]
    return {
        "median_seconds": seconds,
        "floor_seconds": floor,
        "total_over_floor": seconds["total"] / floor,
        "seconds_by_round": {name: [round(each, 4) for each in rounds.values[name]] for name in seconds},
        "naive_seconds": seconds["torch.save and load"] + seconds["first token when resident"],
    }


def report(result: dict[str, Any]) -> None:
    print(f"\n{result['num_readers']} readers, medians of {result['num_rounds']} rounds, ms")
    for name, seconds in result["median_seconds"].items():
        print(f"  {name:28}{seconds * 1e3:8.0f}")
    print(f"  {'floor':28}{result['floor_seconds'] * 1e3:8.0f}   total is {result['total_over_floor']:.2f} times that")
    print(f"  {'naive':28}{result['naive_seconds'] * 1e3:8.0f}")
    for name, share in result["peak_extra_memory_in_cartridges"].items():
        print(f"  {name + ', extra memory':28}{share:8.2f} cartridges")
    for name, seconds in result.get("stall", {}).items():
        print(f"  {name:28}{seconds * 1e3:8.1f}")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    results = []
    for index, num_readers in enumerate(arguments.readers):
        with tempfile.TemporaryDirectory(prefix="foundry-sync-") as directory:
            results.append(await bench(Path(directory), num_readers, arguments.rounds, full=index == 0))
            report(results[-1])
    machine = {"processor": platform.processor() or platform.machine(), "num_cores": os.cpu_count()}
    arguments.result.write_text(json.dumps({"machine": machine, "runs": results}, indent=2) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
