"""A TCP proxy whose connections break after a number of bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress


class CuttingProxy:
    """Forwards to a port. Each connection in turn is cut after the next of `cuts` bytes, both ways together; those
    after the last are not."""

    def __init__(self, port: int, cuts: Iterator[int]) -> None:
        self._target = port
        self._cuts = cuts
        self.num_bytes = 0
        self.num_cut = 0
        self._connections: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        """The port to connect to, until the clients have gone."""

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._connections.append(asyncio.create_task(self._serve(reader, writer)))

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._target)
        left = [next(self._cuts, None)]
        ways = [
            asyncio.create_task(self._forward(reader, upstream_writer, left)),
            asyncio.create_task(self._forward(upstream_reader, writer, left)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        self.num_cut += left[0] is not None and left[0] <= 0
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        for each in (writer, upstream_writer):
            each.transport.abort()

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: list[int | None]
    ) -> None:
        with suppress(ConnectionError):
            while part := await reader.read(2**16):
                if left[0] is not None:
                    left[0] -= len(part)
                    if left[0] <= 0:
                        return
                self.num_bytes += len(part)
                writer.write(part)
                await writer.drain()
