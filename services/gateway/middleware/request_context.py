"""Each request's id and trace: in every log line, in the answer's headers, and on to the rollout servers."""

from __future__ import annotations

import re
from uuid import uuid4

import structlog
from fastapi.telemetry import TelemetryConfig
from opentelemetry import context, trace
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foundry.telemetry import traces

# What is asked at short intervals, for ever.
_UNTRACED = frozenset({"/health", "/healthz", "/ping", "/readyz"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

TRACING: TelemetryConfig = {
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "exclude": lambda scope: scope.get("path") in _UNTRACED,
}
"""What FastAPI traces by itself, if traces are configured: one span for each request."""


class RequestContext:
    """The id is the client's own (`x-request-id`) or a new one; completions have theirs. A request is handled in a task
    of its own, whose context ends with it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else f"req-{uuid4().hex}"
        structlog.contextvars.bind_contextvars(request_id=request_id)
        if not trace.get_current_span().get_span_context().is_valid:
            # A client's trace passes through a gateway that has none itself.
            context.attach(traces.extract(headers))

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                bound: str = structlog.contextvars.get_contextvars()["request_id"]
                MutableHeaders(scope=message).setdefault("x-request-id", bound)
            await send(message)

        await self._app(scope, receive, named)
