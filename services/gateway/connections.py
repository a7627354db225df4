"""Connections to the gateway: only so many, and each has only so long to send a request."""

from __future__ import annotations

import asyncio
import json
import resource
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from foundry.errors import FoundryError, InvalidArgument, Unavailable
from services.gateway import metrics
from services.gateway.errors import error_body
from services.gateway.https import Https

# Of the process, besides clients' connections: Redis, object storage, gRPC, files.
_OTHER_DESCRIPTORS = 512


class RequestTooSlow(InvalidArgument):
    """The request did not come in the time that there is for one."""

    http_status = 408


def connections(max_connections: int, max_upload_seconds: float, https: Https | None) -> type[H11Protocol]:
    """uvicorn's protocol with these bounds; uvicorn makes each connection from a class."""
    full = _answer(Unavailable(f"the gateway has {max_connections} connections: try again", retry_after_seconds=1.0))
    slow = _answer(RequestTooSlow(f"the request was not sent within {max_upload_seconds:g} s"))
    bounds = _Bounds(max_connections, max_upload_seconds, https, full, slow)
    return type("Connection", (_Connection,), {"bounds": bounds})


@dataclass(frozen=True, slots=True)
class _Bounds:
    """`full` and `slow` are what is answered beyond the first two."""

    max_connections: int
    max_upload_seconds: float
    https: Https | None
    full: bytes
    slow: bytes


class _Connection(H11Protocol):
    """uvicorn itself has a bound for idle connections after an answer only.

    With `https` it begins TLS by itself. Of TLS that asyncio begins it would hear when the handshake is over, and could
    neither count nor refuse who never ends it.
    """

    bounds: ClassVar[_Bounds]
    _reading: asyncio.TimerHandle | None = None
    _handshake: asyncio.Task[None] | None = None
    _early = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        metrics.CONNECTIONS.inc()
        if len(self.connections) > self.bounds.max_connections:
            self._refuse(self.bounds.full, "full")
            return
        self._watch()
        if self.bounds.https is not None:
            # Until who reads it is there.
            transport.pause_reading()
            self._handshake = self.loop.create_task(self._secure(self.bounds.https))

    def data_received(self, data: bytes) -> None:
        if self._handshake is not None:
            self._early += data
            return
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        # Of a handshake that failed asyncio sometimes tells.
        if self not in self.connections:
            return
        super().connection_lost(exc)
        metrics.CONNECTIONS.dec()
        self._unwatch()

    async def _secure(self, https: Https) -> None:
        secured = None
        with suppress(OSError):
            context = await asyncio.to_thread(https.current)
            secured = await self.loop.start_tls(
                self.transport, self, context, server_side=True, ssl_handshake_timeout=self.bounds.max_upload_seconds
            )
        # Also None if it was closed meanwhile.
        if secured is None:
            self.connection_lost(None)
            return
        super().connection_made(secured)
        self._handshake = None
        # What came with the end of the handshake.
        if self._early:
            self.data_received(self._early)

    def _watch(self) -> None:
        """Until the request in hand has been sent, which an answer may be waiting for."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._unwatch()
        elif self._reading is None:
            self._reading = self.loop.call_later(self.bounds.max_upload_seconds, self._refuse, self.bounds.slow, "slow")

    def _unwatch(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _refuse(self, answer: bytes, reason: str) -> None:
        metrics.REFUSED_CONNECTIONS.labels(reason).inc()
        # Of an answer that has begun, nothing else may be sent; nor in plain text to who expects TLS.
        secured = self.bounds.https is None or self.scheme == "https"
        if secured and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(answer)
        self.transport.close()


def raise_descriptor_limit(max_connections: int) -> None:
    """Have the system allow what `max_connections` take. Raises InvalidArgument if it never will."""
    wanted = max_connections + _OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise InvalidArgument(
            f"max_connections {max_connections} takes {wanted} file descriptors, the system allows {hard} at most: "
            "raise that (ulimit -Hn) or lower max_connections",
            field="max_connections",
        )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _answer(error: FoundryError) -> bytes:
    body = json.dumps(error_body(error)).encode()
    status = HTTPStatus(error.http_status)
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    if error.retry_after_seconds is not None:
        head += f"retry-after: {error.retry_after_seconds:.0f}\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
