"""Says in every answer what is left of the caller's limits, and frees what a request held when it is answered."""

from __future__ import annotations

from contextlib import AsyncExitStack

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.access.permit import Permit


class RequestLimits:
    """Routes ask for admission, since they know who asks; their answers may be streams that outlast them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        async with AsyncExitStack() as held:
            permit = Permit(held)
            scope.setdefault("state", {})["permit"] = permit

            async def labelled(message: Message) -> None:
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message).update(permit.headers)
                await send(message)

            await self._app(scope, receive, labelled)
