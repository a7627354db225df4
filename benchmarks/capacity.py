"""How many cartridges one GPU serves side by side, and how long a cold one takes: python -m benchmarks.capacity

A rollout server with a model of Llama-3.2-3B's shape with random weights in bfloat16, a real Valkey and a directory on
the local disk as object storage. 250 versions of a 2048-token cartridge (234.9 MB each) are published, one after the
other. The first 40 go to the disk, and each is asked for when its bytes have left Redis and, by `posix_fadvise`, the
page cache: from the request to the first token it is read from the disk, verified, and copied to the device. Asked for
once more it is resident. In the same run a plain read of such a file says what the disk gives. The others come from
Redis. Then 256 sequences decode at once behind all 250, and behind one of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import LLAMA_3B, TINY, build_model
from foundry.buffers import allocate
from foundry.identity import CartridgeBytes, CartridgeHeader
from foundry.model.info import ModelInfo
from foundry.rpc.channel import open_channel, wait_until_serving
from foundry.store import CartridgeId, CartridgeStore, ManifestDraft, StoreSettings
from foundry.v1 import common_pb2, rollout_pb2, rollout_pb2_grpc
from tests.process import Process
from tests.valkey import Valkey

NUM_CARTRIDGES, NUM_COLD, NUM_TOKENS = 250, 40, 2048
NUM_SEQUENCES, PROMPT_TOKENS, ANSWER_TOKENS = 256, 128, 512
NAME, RUN = "capacity", "bench"
# Of the disk's files only the last ones stay, so that they fit wherever there is room for a few.
NUM_KEPT_FILES = 8


class Versions:
    """Publishes cartridges that differ in one number."""

    def __init__(self, store: CartridgeStore, header: CartridgeHeader, objects: Path) -> None:
        self._store, self.header, self._objects = store, header, objects
        memory = torch.frombuffer(allocate(header.num_bytes), dtype=torch.bfloat16)
        block = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.1
        for part in memory.split(len(block)):
            part.copy_(block[: len(part)])
        self._memory = memory
        self._files: list[Path] = []

    async def publish(self, index: int, *, durable: bool) -> CartridgeId:
        self._memory[-1] = index
        data: Any = self._memory.view(torch.uint8).numpy()
        draft = ManifestDraft(name=NAME, run=RUN, attempt=1, step=index)
        return (await self._store.publish(CartridgeBytes(self.header, memoryview(data)), draft, durable=durable)).id

    def file(self, version: CartridgeId) -> Path:
        """Where the version's bytes are, out of the page cache; older files are removed."""
        (path,) = (path for path in self._objects.rglob("*") if version.digest.removeprefix("blake3:") in path.name)
        self._files.append(path)
        for old in self._files[:-NUM_KEPT_FILES]:
            old.unlink(missing_ok=True)
        forget(path)
        return path


def forget(path: Path) -> None:
    """The file's pages leave the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(path: Path, memory: memoryview) -> float:
    """Of a plain read into memory that is there."""
    forget(path)
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(memory):
            pass
    return time.perf_counter() - began


class Client:
    def __init__(self, stub: Any, fingerprint: str) -> None:
        self._stub, self._fingerprint = stub, fingerprint

    def request(self, version: CartridgeId, seed: int, num_prompt: int, num_new: int) -> rollout_pb2.GenerateRequest:
        ids = torch.randint(3, 380, (num_prompt,), generator=torch.Generator().manual_seed(seed)).tolist()
        return rollout_pb2.GenerateRequest(
            model_fingerprint=self._fingerprint,
            token_ids=common_pb2.TokenIds(ids=ids),
            cartridges=[common_pb2.CartridgeId(name=NAME, version=version.version, digest=version.digest)],
            sampling=rollout_pb2.Sampling(seed=seed, max_new_tokens=num_new, ignore_eos=True),
            skip_prefix_cache=True,
        )

    async def first_token_seconds(self, version: CartridgeId) -> float:
        began = time.perf_counter()
        async for chunk in self._stub.Generate(self.request(version, 1, 16, 1), timeout=120):
            assert chunk.identity.cartridges[0].digest == version.digest
        return time.perf_counter() - began

    async def decode(self, versions: Sequence[CartridgeId], num_sequences: int, num_new: int) -> dict[str, float]:
        """All at once, prompts included."""
        requests = [
            self.request(versions[index % len(versions)], index, PROMPT_TOKENS, num_new)
            for index in range(num_sequences)
        ]
        began, num_tokens = time.perf_counter(), 0
        async for answer in self._stub.GenerateBatch(rollout_pb2.GenerateBatchRequest(requests=requests), timeout=600):
            num_tokens += len(answer.completion.ids)
        seconds = time.perf_counter() - began
        return {"seconds": round(seconds, 3), "tokens_per_second": round(num_tokens / seconds, 1)}

    async def num_resident(self) -> int:
        resident = await self._stub.Resident(rollout_pb2.ResidentRequest(), timeout=60)
        return sum(each.tier == rollout_pb2.TIER_DEVICE for each in resident.cartridges)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    milliseconds = sorted(1e3 * each for each in seconds)
    return {
        "median_ms": round(statistics.median(milliseconds), 1),
        "p95_ms": round(milliseconds[math.ceil(0.95 * len(milliseconds)) - 1], 1),
        "largest_ms": round(milliseconds[-1], 1),
    }


async def bench(directory: Path, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    valkey = Valkey(directory)
    await valkey.start()
    objects = directory / "objects"
    settings = StoreSettings.model_validate(
        {"redis_url": valkey.url, "objects_url": f"file://{objects}", "keep_hot": 1}
    )
    spec = ModelInfo.read(model).spec
    header = spec.header(arguments.tokens, 1, torch.bfloat16)
    options = {
        "model": model,
        "device": arguments.device,
        "dtype": "bfloat16",
        "max-sequences": NUM_SEQUENCES,
        "max-sequence-tokens": PROMPT_TOKENS + ANSWER_TOKENS,
        "prefill-tokens-per-step": 2048,
        "cartridge-budget-bytes": (arguments.cartridges + 1) * header.num_bytes,
        "host-cartridge-budget-bytes": 0,
    }
    server = Process(
        "rollout",
        [part for name, value in options.items() for part in (f"--{name}", str(value))] + ["--no-prefetch"],
        directory,
        {"FOUNDRY_STORE__REDIS_URL": valkey.url, "FOUNDRY_STORE__OBJECTS_URL": settings.objects_url},
        python=sys.executable,
    )
    server.start()
    store = await CartridgeStore.open(settings)
    channel = open_channel(server.address)
    try:
        await wait_until_serving(channel, server.address, timeout_seconds=300)
        await store.acquire(NAME, RUN, 1)
        client = Client(rollout_pb2_grpc.RolloutStub(channel), spec.fingerprint)
        found = await measure(client, Versions(store, header, objects), arguments)
    except BaseException:
        print(server.log.read_text()[-4000:], flush=True)
        raise
    finally:
        await channel.close()
        await store.close()
        server.close()
        valkey.close()
    return {"cartridge_bytes": header.num_bytes} | found


async def measure(client: Client, published: Versions, arguments: argparse.Namespace) -> dict[str, Any]:
    versions = [await published.publish(0, durable=True)]
    cold, resident, read, hot = [], [], [], []
    memory = allocate(2 * published.header.num_bytes)
    for index in range(1, arguments.cold + 1):
        # Only the newest version's bytes stay in Redis: the one before it is on the disk alone.
        versions.append(await published.publish(index, durable=True))
        path = published.file(versions[-2])
        cold.append(await client.first_token_seconds(versions[-2]))
        resident.append(await client.first_token_seconds(versions[-2]))
        if index % 4 == 0:
            read.append(read_seconds(path, memory))
    # The last one has not been asked for.
    del versions[-1]
    print(json.dumps(spread(cold[1:])), flush=True)
    for index in range(arguments.cold + 1, arguments.cartridges + 1):
        versions.append(await published.publish(index, durable=False))
        hot.append(await client.first_token_seconds(versions[-1]))
        if index % 50 == 0:
            print(f"{index} cartridges", flush=True)
    seconds = {"cold": cold[1:], "from_redis": hot, "resident": resident[1:], "plain_read": read}
    result: dict[str, Any] = {name: spread(each) for name, each in seconds.items()}
    print(json.dumps(result), flush=True)
    result["resident_cartridges"] = {"number": await client.num_resident()}
    for label, some in (("all", versions), ("one", versions[:1])) * 2:
        # The second time: the first one's prompts may have compiled something.
        result[f"{NUM_SEQUENCES} sequences behind {label}"] = await client.decode(
            some, NUM_SEQUENCES, arguments.answer_tokens
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the program")
    parser.add_argument("--cartridges", type=int, default=NUM_CARTRIDGES)
    parser.add_argument("--cold", type=int, default=NUM_COLD, help="of these: read from the disk")
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS, help="of each cartridge")
    parser.add_argument("--answer-tokens", type=int, default=ANSWER_TOKENS)
    parser.add_argument("--model-directory", type=Path, default=Path("/dev/shm"), help="for the model's files")
    parser.add_argument("--directory", type=Path, default=None, help="on the disk that is measured")
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "capacity.json")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=arguments.model_directory) as model,
        tempfile.TemporaryDirectory(dir=arguments.directory) as directory,
    ):
        # In a process of its own, so that none of the GPU's memory stays with this one.
        shape = TINY if arguments.small else LLAMA_3B
        building = multiprocessing.get_context("spawn").Process(
            target=build_model, args=(Path(model), arguments.device, shape, 8192)
        )
        building.start()
        building.join()
        result = asyncio.run(bench(Path(directory), Path(model), arguments))
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    result = {"device": name, "torch": torch.__version__} | result
    print(json.dumps(result, indent=2))
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
