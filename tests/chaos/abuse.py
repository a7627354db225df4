"""What hostile and careless clients do, each kind one function, in an order that a seed gives."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import httpx

from tests.hostile_bodies import bodies
from tests.process import Process
from tests.services import Stack

# Refusals that name their reason, and answers. Nothing else may come, whatever was sent.
EXPECTED = frozenset({200, 201, 204, 400, 401, 403, 404, 405, 408, 409, 413, 429, 503})
DOCUMENT = "The harbour is open again. The treaty was signed in the spring. The price of grain is twelve. " * 2
_TEXTS = [f"Paragraph {number} of what nobody asked for. " * 40 for number in range(8)]
_RUN = {"num_tokens": 16, "num_steps": 1, "batch_size": 2, "max_new_tokens": 4, "heldout_every": 0}
_METHODS = ("Rollout/Generate", "Rollout/GenerateBatch", "Rollout/Resident", "Teacher/PutContext", "Teacher/Score")


class Abuse:
    """Several at a time, each doing one thing after another."""

    def __init__(
        self, stack: Stack, gateway: Process, rollout: Process, teacher: Process, *, keys: Sequence[str], seed: int
    ) -> None:
        """`keys` are good ones, of several tenants; others are made up."""
        self.statuses: Counter[int] = Counter()
        self.kinds: Counter[str] = Counter()
        self._objects = stack.directory / "objects"
        self._host, _, self._port = gateway.address.rpartition(":")
        self._http = httpx.AsyncClient(base_url=f"http://{gateway.address}", trust_env=False, timeout=60)
        self._keys = keys
        self._called = {"Rollout": rollout.address, "Teacher": teacher.address}
        self._bodies = list(bodies(stack.settings.max_document_bytes * 3 // 2).values())
        self._random = random.Random(seed)
        self.acts: tuple[Callable[[], Awaitable[None]], ...] = (
            self.send_a_hostile_body,
            self.send_half_a_request,
            self.leave_a_stream,
            self.ask_for_what_is_not_there,
            self.ask_for_too_much,
            self.put_documents,
            self.make_and_leave_a_run,
            self.call_without_sense,
            self.write_a_hostile_record,
            self.list_everything,
        )

    async def go_on(self) -> None:
        """Until cancelled. Raises AssertionError for an answer that is none of `EXPECTED`."""
        while True:
            act = self._random.choice(self.acts)
            self.kinds[act.__name__] += 1
            await act()

    async def close(self) -> None:
        await self._http.aclose()

    async def send_a_hostile_body(self) -> None:
        path, body = self._random.choice(self._bodies)
        await self._send("POST", path, content=body, headers=self._key() | {"content-type": "application/json"})

    async def send_half_a_request(self) -> None:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 999\r\n\r\n{"
        with suppress(OSError):
            reader, writer = await asyncio.open_connection(self._host, int(self._port))
            try:
                writer.write(head[: self._random.randrange(len(head))])
                await writer.drain()
                if self._random.random() < 0.5:
                    # Until the gateway has had enough of it.
                    await reader.read()
            finally:
                writer.transport.abort()

    async def leave_a_stream(self) -> None:
        body = self._chat(stream=True, max_tokens=200, ignore_eos=True, n=self._random.randrange(1, 5))
        with suppress(httpx.TransportError):
            async with self._http.stream("POST", "/v1/chat/completions", json=body, headers=self._key()) as response:
                self._expect(response.status_code, "a stream")
                async for _ in response.aiter_bytes():
                    if self._random.random() < 0.3:
                        return

    async def ask_for_what_is_not_there(self) -> None:
        name = self._random.choice(
            ["nobody", "a" * 5000, "../../etc/passwd", "x@" + "9" * 400, "%00", "blake3:zz", "é"]
        )
        path = self._random.choice(
            ["/v1/models", "/v1/cartridges", "/v1/documents", "/v1/runs", "/v1/cartridges/x/tags"]
        )
        await self._send(
            self._random.choice(["GET", "DELETE", "PUT", "POST"]), f"{path}/{httpx.URL(name).raw_path.decode()}"
        )
        await self._send("POST", "/v1/chat/completions", json=self._chat(model=name))

    async def ask_for_too_much(self) -> None:
        options: list[dict[str, Any]] = [
            {"max_tokens": 10**400},
            {"max_tokens": 10**6},
            {"n": 128, "max_tokens": 2000, "stream": True},
            {"messages": [{"role": "user", "content": "word " * 50_000}]},
            {"temperature": 1e308},
            {"stop": ["x"] * 1000},
        ]
        with suppress(httpx.TimeoutException):
            await self._send("POST", "/v1/chat/completions", json=self._chat(**self._random.choice(options)), timeout=2)

    async def put_documents(self) -> None:
        texts = [self._random.choice(_TEXTS).encode(), b"\0", b"\xff" * 1000, b"", b"long " * 10**5]
        for text in self._random.sample(texts, 2):
            await self._send(
                "POST", "/v1/documents", content=text, headers=self._key() | {"content-type": "text/plain"}
            )

    async def make_and_leave_a_run(self) -> None:
        spec = {"name": f"abused-{self._random.randrange(4)}", "text": DOCUMENT} | _RUN
        key = self._key()
        made = await self._send("POST", "/v1/runs", json=spec, headers=key)
        if made is None or made.status_code != 201:
            return
        run_id = made.json()["id"]
        with suppress(httpx.TransportError):
            async with self._http.stream("GET", f"/v1/runs/{run_id}/events", headers=key) as events:
                async for _ in events.aiter_bytes():
                    break
        await self._send("POST", f"/v1/runs/{run_id}/cancel", headers=key)
        while True:
            gone = await self._send("DELETE", f"/v1/runs/{run_id}", headers=key)
            # 409: its worker has still to end it.
            if gone is None or gone.status_code != 409:
                return
            await asyncio.sleep(0.1)

    async def call_without_sense(self) -> None:
        method = self._random.choice(_METHODS)
        async with grpc.aio.insecure_channel(self._called[method.partition("/")[0]]) as channel:
            content = self._random.randbytes(self._random.randrange(200))
            with suppress(grpc.aio.AioRpcError):
                call: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/foundry.v1.{method}")
                async for _ in call(content, timeout=10):
                    pass

    async def write_a_hostile_record(self) -> None:
        place = self._random.choice(
            ["runs/run-junk/run.json", f"documents/{'ab' * 32}.json", "cartridges/junk/0000000001.json"]
        )
        content = self._random.choice(
            [b"[" * 100_000, b"{}", self._random.randbytes(100), json.dumps(10**300).encode()]
        )
        await asyncio.to_thread(_write, self._objects / place, content)

    async def list_everything(self) -> None:
        for path in ("/v1/models", "/v1/cartridges", "/v1/documents", "/v1/runs", "/readyz", "/openapi.json"):
            await self._send("GET", path, headers=self._key() | {"x-request-id": "\t" * self._random.randrange(3)})

    def _key(self) -> dict[str, str]:
        """A good one in nine cases of ten."""
        unknown = f"fdy_{'a' * 12}_{self._random.randbytes(24).hex()}"
        key = self._random.choice(self._keys) if self._random.random() < 0.9 else unknown
        return {"authorization": f"Bearer {key}"}

    async def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response | None:
        """None where the gateway hung up."""
        try:
            response = await self._http.request(method, path, **({"headers": self._key()} | arguments))
        except (httpx.RemoteProtocolError, httpx.WriteError, httpx.ReadError, httpx.LocalProtocolError):
            return None
        self._expect(response.status_code, f"{method} {path[:80]}")
        return response

    def _expect(self, status: int, what: str) -> None:
        self.statuses[status] += 1
        assert status in EXPECTED, f"{status} to {what}"

    def _chat(self, **changes: Any) -> dict[str, Any]:
        return {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 4} | changes


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
