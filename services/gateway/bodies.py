"""JSON bodies: refused unread where they would take more time or memory than their length says, and read off the loop.

Parsed, an empty list takes twenty times its two bytes; a body of nothing else would fill the memory and hold up every
other request. What a body may hold of that is counted in its bytes before anything is made of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute

from foundry.errors import InvalidArgument
from foundry.untrusted import check_depth
from services.gateway.errors import Refused

# Most values of a body, above all a long prompt's token ids, and of these most strings, lists and objects.
MAX_VALUES, MAX_PARTS = 2**17 + 2**12, 2**15
# One that is shorter is read sooner than a thread takes it up.
_MIN_THREAD_BYTES = 16 * 1024
# At a time, so that other threads get their turn in between.
_STRIDE_BYTES = 256 * 1024


class BoundedRoute(APIRoute):
    """For routers whose bodies are JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await handler(_Request(request.scope, request.receive))

        return bounded


class _Request(Request):
    async def json(self) -> Any:
        """Raises Refused, which FastAPI passes on as it is."""
        content = await self.body()
        try:
            return parse(content) if len(content) < _MIN_THREAD_BYTES else await asyncio.to_thread(parse, content)
        except InvalidArgument as error:
            raise Refused(error) from error


def parse(content: bytes) -> Any:
    """Raises InvalidArgument for what is not JSON, nested more than 64 deep or holds too much."""
    counted = _Counted()
    for begin in range(0, len(content), _STRIDE_BYTES):
        counted.add(content[begin : begin + _STRIDE_BYTES])
    try:
        value = orjson.loads(content)
    except ValueError as error:
        raise InvalidArgument(f"the body is not JSON: {error}") from error
    check_depth(value)
    return value


class _Counted:
    """What there is in JSON that comes piece by piece. Up to where it stops being JSON this is exact."""

    def __init__(self) -> None:
        self._num_values = self._num_parts = 0
        self._in_string = False
        # Half an escape that the last piece ended with.
        self._rest = b""

    def add(self, piece: bytes) -> None:
        """Raises InvalidArgument as soon as there is too much."""
        piece = self._rest + piece
        num_backslashes = len(piece) - len(piece.rstrip(b"\\"))
        piece, self._rest = (piece[:-1], b"\\") if num_backslashes % 2 else (piece, b"")
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        num_quotes = piece.count(b'"')
        self._num_parts += (num_quotes + self._in_string) // 2
        self._check()
        outside = b"".join(piece.split(b'"')[self._in_string :: 2])
        self._in_string ^= num_quotes % 2 == 1
        self._num_parts += outside.count(b"[") + outside.count(b"{")
        self._num_values += outside.count(b",")
        self._check()

    def _check(self) -> None:
        if self._num_parts > MAX_PARTS:
            raise InvalidArgument(f"the body has more than {MAX_PARTS} strings, lists and objects")
        if self._num_values + self._num_parts > MAX_VALUES:
            raise InvalidArgument(f"the body has more than {MAX_VALUES} values")
