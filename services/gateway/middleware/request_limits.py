"""Refuses what goes beyond the caller's limits, before its body is read, and says in every answer what is left."""

from __future__ import annotations

from contextlib import AsyncExitStack

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foundry.errors import ResourceExhausted
from services.gateway.access.principal import principal_of
from services.gateway.access.rates import Rates
from services.gateway.errors import response_of

_COMPLETIONS = frozenset({"/v1/chat/completions", "/v1/completions"})


class RequestLimits:
    """Not a dependency of the routes: FastAPI reads a body before it asks those. What is asked of the gateway itself
    (health, metrics, documentation) has no limit."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        rates: Rates = scope["app"].state.gateway.rates
        completion = scope["path"].rstrip("/") in _COMPLETIONS
        headers: dict[str, str] = {}

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(headers)
            await send(message)

        async with AsyncExitStack() as admitted:
            answer = self._app
            try:
                await admitted.enter_async_context(rates.admitted(principal_of(scope), headers, completion=completion))
            except ResourceExhausted as error:
                answer = response_of(error)
            await answer(scope, receive, labelled)
