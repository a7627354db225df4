"""What became of a request, for those who note it."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send


async def answered(app: ASGIApp, scope: Scope, receive: Receive, send: Send, note: Callable[[int], None]) -> None:
    """Have `app` answer, then tell `note` the status: 499 if the client left before anything was sent."""
    status = 499

    async def observed(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        await send(message)

    try:
        await app(scope, receive, observed)
    except Exception:
        status = 500
        raise
    finally:
        note(status)
