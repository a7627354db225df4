"""Certificates made for the test; and TLS before a plain server, for servers whose binary was built without."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import trustme

from foundry.local.ports import HOST

_CHUNK_BYTES = 2**16


class Authority:
    """A certificate authority of its own. `file` is what those who trust it are given."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self._authority = trustme.CA()
        self._directory = directory
        self.file = directory / "authority.pem"
        self._authority.cert_pem.write_to_path(self.file)

    def issue(self, name: str) -> tuple[Path, Path]:
        """Files of a certificate for `name` and of its key; new ones in the same files when it is issued again."""
        issued = self._authority.issue_cert(name)
        certificate, key = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        return certificate, key


class TlsFront:
    """Takes TLS connections and passes what is in them on to a port of this machine."""

    def __init__(self, authority: Authority, port: int, *, client_certificates: bool = False) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*authority.issue(HOST))
        if client_certificates:
            self._context.load_verify_locations(authority.file)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._behind = port
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, HOST, 0, ssl=self._context)

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        try:
            behind_reader, behind_writer = await asyncio.open_connection(HOST, self._behind)
        except OSError:
            writer.transport.abort()
            return
        try:
            ways = [
                asyncio.create_task(way) for way in (_pass_on(reader, behind_writer), _pass_on(behind_reader, writer))
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        finally:
            behind_writer.transport.abort()
            writer.transport.abort()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while content := await reader.read(_CHUNK_BYTES):
        writer.write(content)
        await writer.drain()
