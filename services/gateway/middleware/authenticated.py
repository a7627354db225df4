"""Finds out who sent a request, before anything of its body is read."""

from __future__ import annotations

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from foundry.errors import FoundryError
from services.gateway.errors import response_of
from services.gateway.state import Gateway


class Authenticated:
    """What is asked of the gateway itself (health, documentation) has no key."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            gateway: Gateway = scope["app"].state.gateway
            if gateway.authentication is not None:
                try:
                    principal = await gateway.authentication.principal_of(Headers(scope=scope).get("authorization", ""))
                except FoundryError as error:
                    await response_of(error)(scope, receive, send)
                    return
                structlog.contextvars.bind_contextvars(client=principal.client, tenant=principal.tenant)
                scope.setdefault("state", {})["principal"] = principal
        await self._app(scope, receive, send)
