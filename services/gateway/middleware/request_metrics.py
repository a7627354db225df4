"""Counts and times every request."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.metrics import REQUEST_SECONDS, REQUESTS
from services.gateway.middleware.answered import answered

# Clients may send any word.
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})


class RequestMetrics:
    """By route template, never by raw path: labels must stay few."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()

        def note(status: int) -> None:
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            REQUESTS.labels(method, route, status).inc()
            REQUEST_SECONDS.labels(route).observe(time.perf_counter() - began)

        await answered(self._app, scope, receive, send, note)
