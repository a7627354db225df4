"""A TCP proxy between two real parties, which damages what passes as it was told."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto

from foundry.tasks import end
from tests.chaos.faults.fault import Fault

_READ_BYTES = 2**16


class Direction(Enum):
    REQUEST = auto()
    REPLY = auto()


class Harm(Enum):
    CUT = "cut"
    TRUNCATE = "truncate"
    DELAY = "delay"
    DROP = "drop"
    FLIP = "flip"


@dataclass
class _Armed:
    fault: Fault
    harm: Harm
    direction: Direction
    # Bytes that may still pass in that direction, over all connections.
    offset: int
    bit: int = 0
    seconds: float = 0.0


class Link:
    """Forwards every connection to `upstream`, which may change (a server that came back elsewhere)."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.upstream = upstream
        self._armed: list[_Armed] = []
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)

    @property
    def port(self) -> int:
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def arm(
        self, fault: Fault, harm: Harm, direction: Direction, *, offset: int, bit: int = 0, seconds: float = 0.0
    ) -> None:
        """Let `offset` bytes pass in that direction, then do harm once."""
        fault.detail = f"{direction.name.lower()}, after {offset} bytes"
        self._armed.append(_Armed(fault, harm, direction, offset, bit, seconds))

    def disarm(self) -> None:
        self._armed.clear()

    async def close(self) -> None:
        self._server.close()
        await end(*self._connections)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            # Either end went away, or the proxy is being closed: both are the end of this connection, no more.
            pass
        finally:
            writer.transport.abort()
            self._connections.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(*self.upstream)
        pumps = [
            asyncio.create_task(self._pump(reader, upstream_writer, Direction.REQUEST)),
            asyncio.create_task(self._pump(upstream_reader, writer, Direction.REPLY)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            upstream_writer.transport.abort()
            await end(*pumps)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
        """Ends when the connection is over."""
        while data := await reader.read(_READ_BYTES):
            for armed in [each for each in self._armed if each.direction is direction]:
                if armed.offset >= len(data):
                    armed.offset -= len(data)
                    continue
                self._armed.remove(armed)
                armed.fault.fired = True
                match armed.harm:
                    case Harm.CUT:
                        return
                    case Harm.TRUNCATE:
                        writer.write(data[: armed.offset])
                        await writer.drain()
                        return
                    case Harm.DELAY:
                        await asyncio.sleep(armed.seconds)
                    case Harm.DROP:
                        writer.write(data[: armed.offset])
                        # Up, and saying nothing more this way, until somebody gives up or a router forgets it.
                        with suppress(TimeoutError):
                            async with asyncio.timeout(armed.seconds):
                                while await reader.read(_READ_BYTES):
                                    pass
                        return
                    case Harm.FLIP:
                        damaged = bytearray(data)
                        damaged[armed.offset] ^= 1 << armed.bit
                        data = bytes(damaged)
            writer.write(data)
            await writer.drain()
