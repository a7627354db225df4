"""The services of one tiny model for tests, each a real process: Valkey, rollout, teacher, trainer, gateway."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
import httpx
import torch
from openai import OpenAI

from foundry.local.ports import reserve
from foundry.model.cartridge import Cartridge
from foundry.model.lm import FrozenLM
from foundry.rpc.channel import open_channel, wait_until_serving
from foundry.rpc.tls import Credentials
from foundry.store import CartridgeStore, Manifest, ManifestDraft, StoreSettings
from foundry.v1 import rollout_pb2, rollout_pb2_grpc
from tests.process import Process
from tests.tiny import build_tiny_model
from tests.valkey import Valkey

# An interpreter whose environment has vLLM: `make test-vllm` runs suites once more, with that engine in the rollouts.
VLLM_PYTHON = os.environ.get("FOUNDRY_TEST_VLLM_PYTHON", "")
# vLLM is imported in three processes, one after the other.
START_SECONDS = 180.0 if VLLM_PYTHON else 60.0
T = TypeVar("T")


class Stack:
    """Valkey, a store, rollout servers of one tiny model, and a gateway before them."""

    def __init__(
        self,
        directory: Path,
        *,
        persistent_valkey: bool = False,
        chat_template: str = "",
        environment: Mapping[str, str] | None = None,
        **store: Any,
    ) -> None:
        """Every process here gets `environment`, and `store` as the settings of its store."""
        self.directory = directory
        # vLLM's kernels for CPUs take no smaller heads.
        self.model = build_tiny_model(directory / "models" / "tiny", head_dim=32 if VLLM_PYTHON else 16)
        if chat_template:
            (self.model / "chat_template.jinja").write_text(chat_template)
        self.lm = FrozenLM.load(self.model)
        self.valkey = Valkey(directory, persistent=persistent_valkey)
        values = {
            "redis_url": self.valkey.url,
            "objects_url": f"file://{directory}/objects",
            "max_document_bytes": 100_000,
            **store,
        }
        self.settings = StoreSettings.model_validate(values)
        self._environment = {f"FOUNDRY_STORE__{name.upper()}": str(value) for name, value in values.items()}
        self._environment |= {"FOUNDRY_TRACKING_DIRECTORY": str(directory / "tracking"), **(environment or {})}
        self._processes: list[Process] = []
        self._ports: list[socket.socket] = []

    def spawn(
        self, name: str, *arguments: str, module: str = "", address: str = "", python: str = "", **environment: str
    ) -> Process:
        process = Process(
            name,
            arguments,
            self.directory,
            self._environment | environment,
            module=module,
            address=address,
            python=python,
        )
        self._processes.append(process)
        process.start()
        return process

    def free_port(self) -> int:
        held = reserve()
        self._ports.append(held)
        return int(held.getsockname()[1])

    def rollout(self, *arguments: str, module: str = "", address: str = "") -> Process:
        engine = {"FOUNDRY_ENGINE": "vllm", "FOUNDRY_VLLM__KV_BYTES": str(256 * 1024**2)} if VLLM_PYTHON else {}
        return self.spawn(
            "rollout",
            *("--model", str(self.model), *arguments),
            module=module,
            address=address,
            python=VLLM_PYTHON,
            **engine,
        )

    def gateway(self, rollouts: Sequence[Process], *arguments: str) -> Process:
        # By name, as in a cluster: it is looked up again and again, and may stand for more than one address.
        # Without rollout servers: a port on which nobody will listen.
        answering = [rollout.address for rollout in rollouts] or [f"127.0.0.1:{self.free_port()}"]
        addresses = ",".join(address.replace("127.0.0.1", "localhost") for address in answering)
        return self.spawn("gateway", "--rollout-addresses", addresses, "--poll-seconds", "0.2", *arguments)

    def close(self) -> None:
        # All at once: each takes its time.
        for process in self._processes:
            process.terminate()
        for process in reversed(self._processes):
            process.close()
        for held in self._ports:
            held.close()
        self.valkey.close()

    def with_store(self, work: Callable[[CartridgeStore], Awaitable[T]]) -> T:
        """Run `work` on a store of this process, as another service would."""

        async def run() -> T:
            store = await CartridgeStore.open(self.settings)
            try:
                return await work(store)
            finally:
                await store.close()

        return asyncio.run(run())

    def publish(self, name: str, *cartridges: Cartridge, durable: bool = True) -> list[Manifest]:
        """Versions of `name`, one for each cartridge, as a run would publish them."""

        async def work(store: CartridgeStore) -> list[Manifest]:
            run = f"test-{name.replace('/', '-')}"
            await store.acquire(name, run, 1)
            manifests = [
                await store.publish(
                    cartridge.to_bytes(), ManifestDraft(name=name, run=run, attempt=1, step=step), durable=durable
                )
                for step, cartridge in enumerate(cartridges, start=1)
            ]
            await store.release(name, run, 1)
            return manifests

        return self.with_store(work)

    def cartridge(self, seed: int, num_tokens: int = 12) -> Cartridge:
        """Random keys and values, large enough to change every answer."""
        spec = self.lm.spec
        generator = torch.Generator().manual_seed(seed)
        shape = spec.kv_shape(num_tokens)
        return Cartridge(spec.header(num_tokens, 1, torch.float32), torch.randn(shape, generator=generator))

    def greedy(self, prompt_ids: Sequence[int], cartridges: Sequence[Cartridge], num_tokens: int) -> list[int]:
        """Offline greedy decoding, one whole forward a token; ends after an end-of-sequence token."""
        kv = torch.cat([cartridge.kv_L2GPD for cartridge in cartridges], dim=3) if cartridges else None
        answer: list[int] = []
        while len(answer) < num_tokens and not (answer and answer[-1] in self.lm.eos_ids):
            hidden = self.lm.packed_hidden([[*prompt_ids, *answer]], [kv])
            answer.append(int(self.lm.logits(hidden[-1:]).argmax()))
        return answer


def wait_serving(process: Process, credentials: Credentials | None = None, *, server_name: str = "") -> None:
    """Return when a gRPC service serves; one with TLS to those who have credentials."""

    async def wait() -> None:
        channel = open_channel(process.address, credentials, server_name=server_name)
        try:
            await wait_until_serving(channel, process.address, timeout_seconds=START_SECONDS)
        finally:
            await channel.close()

    try:
        asyncio.run(wait())
    except Exception:
        print(process.log.read_text())
        raise


def wait_ready(gateway: Process, path: str = "/readyz") -> None:
    """Return when the gateway answers 200."""
    wait_until(lambda: get(gateway, path).status_code == 200, gateway)


def wait_until(condition: Callable[[], bool], process: Process) -> None:
    """Poll what has no event to wait for: another process's state."""

    async def wait() -> None:
        async with asyncio.timeout(START_SECONDS):
            while True:
                process.check_alive()
                try:
                    if condition():
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.02)

    asyncio.run(wait())


def get(gateway: Process, path: str) -> httpx.Response:
    return httpx.get(f"http://{gateway.address}{path}", trust_env=False)


def metric(address: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    total = 0.0
    for line in httpx.get(f"http://{address}/metrics", trust_env=False).text.splitlines():
        matched = re.fullmatch(rf"{re.escape(name)}(\{{.*\}})? (\S+)", line)
        if matched and all(f'{label}="{value}"' in (matched[1] or "") for label, value in labels.items()):
            total += float(matched[2])
    return total


def resident(rollout: Process) -> dict[str, int]:
    """References by digest of what a rollout server holds."""

    async def ask() -> rollout_pb2.ResidentResponse:
        channel = open_channel(rollout.address)
        try:
            stub: rollout_pb2_grpc.RolloutAsyncStub = rollout_pb2_grpc.RolloutStub(channel)
            return await stub.Resident(rollout_pb2.ResidentRequest(), timeout=10)
        except grpc.aio.AioRpcError:
            return rollout_pb2.ResidentResponse()
        finally:
            await channel.close()

    return {held.cartridge.digest: held.references for held in asyncio.run(ask()).cartridges}


@contextmanager
def openai_client(gateway: Process) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"http://{gateway.address}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


@contextmanager
def open_stack(directory: Path, *, chat_template: str = "") -> Iterator[Stack]:
    """A stack whose Valkey runs."""
    stack = Stack(directory, chat_template=chat_template)
    try:
        asyncio.run(stack.valkey.start())
        yield stack
    finally:
        stack.close()
