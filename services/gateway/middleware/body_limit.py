"""Refuses request bodies that are too large, by their announced length or while they stream in."""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.errors import Refused, RequestTooLarge, response_of


class BodyLimit:
    """`limits` maps patterns of paths to their bytes; every other path takes `max_bytes`. Nothing beyond a limit is
    buffered."""

    def __init__(self, app: ASGIApp, max_bytes: int, limits: dict[str, int]) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._limits = [(re.compile(pattern), limit) for pattern, limit in limits.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].rstrip("/")
        limit = next((limit for pattern, limit in self._limits if pattern.fullmatch(path)), self._max_bytes)
        too_large = RequestTooLarge(f"the request body is larger than {limit} bytes")
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > limit:
            await response_of(too_large)(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            part = await receive()
            received += len(part.get("body", b""))
            if received > limit:
                raise Refused(too_large)
            return part

        await self._app(scope, limited, send)
