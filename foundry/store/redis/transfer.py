"""Values of many megabytes to and from Redis: from and into the memory where they stand, with no copy between.

The client library connects (TLS, users, timeouts) and speaks every other command. For these values it would gather each
reply from pieces of 64 KiB under the interpreter's lock: ten times as long as the transfer, and engines would stall.
Protocol: https://redis.io/docs/latest/develop/reference/protocol-spec (RESP2). Blocking: to be called in a thread.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, cast

import structlog
from redis.connection import ConnectionInterface

from foundry.errors import DigestMismatch, NotFound, StoreFull, StoreRefused, StoreUnavailable

log = structlog.get_logger(__name__)

# Requests sent ahead of the replies: hides the round trip, bounds what the server holds for us.
_AHEAD = 2
# Connections in a row that are closed before a single piece has passed.
_MAX_FRUITLESS = 3
_READ_BUFFER_BYTES = 4096
_MAX_LINE_BYTES = 1024

Piece = tuple[str, memoryview]
"""A key and its value: to be sent, or memory that the value exactly fills."""


def send(connect: Callable[[], ConnectionInterface], pieces: Sequence[Piece], *, expire_seconds: int) -> None:
    """Set the keys. Resumes where it was cut; raises StoreUnavailable when nothing moves, StoreFull."""
    for _ in _resuming(connect, pieces, lambda link, rest: link.set_all(rest, expire_seconds)):
        pass


def receive(connect: Callable[[], ConnectionInterface], pieces: Sequence[Piece]) -> Iterator[int]:
    """Fill each piece's memory; yields how many are filled so far. Resumes where it was cut.

    Raises NotFound if a key is gone, DigestMismatch if its value has another length, StoreUnavailable.
    """
    return _resuming(connect, pieces, lambda link, rest: link.get_all(rest))


def _resuming(
    connect: Callable[[], ConnectionInterface],
    pieces: Sequence[Piece],
    work: Callable[[_Link, Sequence[Piece]], Iterator[None]],
) -> Iterator[int]:
    done = num_fruitless = 0
    while done < len(pieces):
        before = done
        try:
            with _Link(connect()) as link:
                for _ in work(link, pieces[done:]):
                    done += 1
                    yield done
        except (OSError, EOFError, ValueError) as error:
            num_fruitless = num_fruitless + 1 if done == before else 0
            # A server that is silent has used up its time; one that hangs up is asked again.
            if num_fruitless > _MAX_FRUITLESS or isinstance(error, TimeoutError):
                raise StoreUnavailable(f"Redis can't be used: {error!r} at {pieces[done][0]}") from error
            log.warning("transfer_cut", key=pieces[done][0], num_done=done, num_pieces=len(pieces), error=repr(error))


class _Link:
    """One connection that carries nothing else. Whatever goes wrong on it, it is closed and not used again."""

    def __init__(self, connection: ConnectionInterface) -> None:
        # The library's types say too little of it. It is connected, and nothing of it was read ahead.
        self._connection = cast(Any, connection)
        self._socket: socket.socket = self._connection._sock
        self._replies = self._socket.makefile("rb", buffering=_READ_BUFFER_BYTES)

    def __enter__(self) -> _Link:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._replies.close()
        self._connection.disconnect()

    def set_all(self, pieces: Sequence[Piece], expire_seconds: int) -> Iterator[None]:
        for index, (key, value) in enumerate(pieces):
            self._socket.sendall(b"*5\r\n$3\r\nSET\r\n" + _bulk(key.encode()) + b"$%d\r\n" % value.nbytes)
            self._socket.sendall(value)
            self._socket.sendall(b"\r\n$2\r\nEX\r\n" + _bulk(b"%d" % expire_seconds))
            if index >= _AHEAD:
                self._reply(b"+", key)
                yield
        for key, _ in pieces[-_AHEAD:]:
            self._reply(b"+", key)
            yield

    def get_all(self, pieces: Sequence[Piece]) -> Iterator[None]:
        sent = 0
        for index, (key, memory) in enumerate(pieces):
            while sent < min(len(pieces), index + _AHEAD):
                self._socket.sendall(b"*2\r\n$3\r\nGET\r\n" + _bulk(pieces[sent][0].encode()))
                sent += 1
            length = int(self._reply(b"$", key))
            if length < 0:
                raise NotFound(f"Redis has no {key}")
            if length != memory.nbytes:
                raise DigestMismatch(f"{key} has {length} bytes in Redis, expected {memory.nbytes}")
            if self._replies.readinto(memory) != length or self._replies.read(2) != b"\r\n":
                raise EOFError("the connection was closed")
            yield

    def _reply(self, kind: bytes, key: str) -> bytes:
        """What follows the mark `kind` in the next reply's first line."""
        line: bytes = self._replies.readline(_MAX_LINE_BYTES)
        if not line.endswith(b"\r\n"):
            raise EOFError("the connection was closed")
        if line.startswith(b"-OOM"):
            raise StoreFull(f"Redis is full: {line[1:-2].decode(errors='replace')}")
        if line.startswith(b"-NOPERM"):
            raise StoreRefused(f"Redis refused {key}: check the user's ACL (docs/store.md): {line[1:-2].decode()}")
        if line.startswith(b"-WRONGTYPE"):
            raise DigestMismatch(f"{key} in Redis is damaged: it has another type")
        if not line.startswith(kind):
            raise StoreUnavailable(f"Redis refused {key}: {line[:200].decode(errors='replace').strip()}")
        return line[1:-2]


def _bulk(text: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(text), text)
