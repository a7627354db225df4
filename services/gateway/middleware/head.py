"""HEAD, which asks for what GET would answer, without its content."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Head:
    """Stands before the routes, of which each takes the methods that it names."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        answered = False

        async def received() -> Message:
            # A stream is ended as when its client has left.
            return {"type": "http.disconnect"} if answered else await receive()

        async def head_alone(message: Message) -> None:
            nonlocal answered
            if not answered:
                answered = True
                await send(message)
                await send({"type": "http.response.body"})

        # In place: those who note the request read what the routes write there.
        scope["method"] = "GET"
        try:
            await self._app(scope, received, head_alone)
        finally:
            scope["method"] = "HEAD"
