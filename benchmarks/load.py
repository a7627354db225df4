"""Who asks in benchmarks/gateway.py: streamed chats over HTTP or gRPC, at times that don't depend on the answers.

It costs as little as can be, since it takes its time from those that it measures: HTTP is read from the socket.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from foundry.rpc.channel import open_channel, typed_errors
from foundry.v1 import common_pb2, rollout_pb2, rollout_pb2_grpc

TIMEOUT_SECONDS = 120.0
NUM_PROMPTS = 32


@dataclass
class Answer:
    """What became of one chat."""

    status: int = 0
    # From the time at which it was due to be sent.
    first_token_seconds: float = 0.0
    num_chunks: int = 0
    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    # Ended as it should: [DONE] over HTTP.
    is_whole: bool = False
    error: str = ""


class Http:
    """To a gateway, by connections that are kept."""

    def __init__(self, address: str, model: str) -> None:
        host, _, port = address.rpartition(":")
        self._host, self._port, self._model = host, int(port), model
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        # Streams that have begun, and not ended.
        self.num_open = 0

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()

    async def chat(self, number: int, due: float, num_tokens: int) -> Answer:
        answer = Answer()
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS), self._connection() as (reader, writer):
                writer.write(self._request(number, num_tokens))
                head = await reader.readuntil(b"\r\n\r\n")
                answer.status = int(head.split(b" ", 2)[1])
                if answer.status == 200:
                    await self._read(reader, answer, due)
                else:
                    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                    await reader.readexactly(int(lengths[0].partition(b":")[2]))
        except (OSError, EOFError, TimeoutError) as error:
            answer.error = repr(error)
        return answer

    async def _read(self, reader: asyncio.StreamReader, answer: Answer, due: float) -> None:
        self.num_open += 1
        try:
            while True:
                # Before it is the length of its HTTP chunk.
                event = (await reader.readuntil(b"\n\n")).partition(b"data: ")[2]
                # The first event has the role alone.
                if answer.num_chunks == 1:
                    answer.first_token_seconds = time.perf_counter() - due
                if event == b"[DONE]\n\n":
                    break
                answer.num_chunks += 1
                choice = json.loads(event)["choices"][0]
                answer.ids += choice.get("token_ids", ())
                answer.finish_reason = choice["finish_reason"] or answer.finish_reason
            await reader.readuntil(b"0\r\n\r\n")
            answer.is_whole = True
        finally:
            self.num_open -= 1

    def _request(self, number: int, num_tokens: int) -> bytes:
        body = json.dumps(
            {
                "model": self._model,
                "messages": [{"role": "user", "content": prompt(number)}],
                "max_tokens": num_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
                "stream": True,
            }
        ).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
        return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        connection = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
        try:
            yield connection
        except BaseException:
            connection[1].close()
            raise
        self._idle.append(connection)


class Grpc:
    """To a rollout server, by one channel, as the gateway has it."""

    def __init__(self, address: str, cartridge: common_pb2.CartridgeId) -> None:
        self._channel = open_channel(address)
        self._stub: rollout_pb2_grpc.RolloutAsyncStub = rollout_pb2_grpc.RolloutStub(self._channel)
        self._cartridge = cartridge
        self._fingerprint = ""

    async def open(self) -> None:
        answer = await self._stub.Resident(rollout_pb2.ResidentRequest(), timeout=TIMEOUT_SECONDS)
        self._fingerprint = answer.model_fingerprint

    async def close(self) -> None:
        await self._channel.close()

    async def chat(self, number: int, due: float, num_tokens: int) -> Answer:
        answer = Answer()
        request = rollout_pb2.GenerateRequest(
            request_id=str(number),
            model_fingerprint=self._fingerprint,
            conversation=common_pb2.Conversation(messages=[common_pb2.Message(role="user", content=prompt(number))]),
            cartridges=[self._cartridge],
            sampling=rollout_pb2.Sampling(temperature=0, max_new_tokens=num_tokens, ignore_eos=True),
            caller=common_pb2.Caller(client=str(number)),
        )
        with typed_errors("the rollout server"):
            async for chunk in self._stub.Generate(request, timeout=TIMEOUT_SECONDS):
                if not answer.num_chunks:
                    answer.first_token_seconds = time.perf_counter() - due
                answer.num_chunks += 1
                answer.ids += chunk.ids
                answer.is_whole = chunk.HasField("usage")
        return answer


def prompt(number: int) -> str:
    return f"What does the document say about harbour {number % NUM_PROMPTS}?"


def arrivals(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Times of a Poisson process, in seconds."""
    random_ = random.Random(seed)
    at = random_.expovariate(rate)
    while at < seconds:
        yield at
        at += random_.expovariate(rate)


async def open_loop(
    ask: Callable[[int, float], Awaitable[Answer]], rate: float, seconds: float, seed: int
) -> list[Answer]:
    """`ask` gets the number of each chat and when it was due, in `time.perf_counter()`. Returns when all have ended."""
    began, asked = time.perf_counter(), []
    for number, at in enumerate(arrivals(rate, seconds, seed)):
        await asyncio.sleep(began + at - time.perf_counter())
        asked.append(asyncio.ensure_future(ask(number, began + at)))
    return await asyncio.gather(*asked)
