"""Routes that ask who it is, whether they may do that, and whether they have had enough."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import structlog
from fastapi import Request, Response
from fastapi.security import HTTPBearer

from foundry.errors import PermissionDenied
from services.gateway.access.permit import Permit
from services.gateway.access.principal import Principal
from services.gateway.access.scopes import COMPLETIONS, needed
from services.gateway.bodies import BoundedRoute
from services.gateway.state import Gateway

# For the documentation, which then asks for a key.
BEARER = HTTPBearer(auto_error=False, scheme_name="API key", description="`fdy_…`, as `foundry keys create` makes it.")


class ScopedRoute(BoundedRoute):
    """Refuses before anything of the body is read, where a dependency would come too late."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        scope, completion = needed(self.methods, self.path), self.path in COMPLETIONS

        async def scoped(request: Request) -> Response:
            gateway: Gateway = request.app.state.gateway
            principal = await _who_asks(request, gateway)
            if scope not in principal.scopes:
                raise PermissionDenied(
                    f"{request.method} {request.url.path} needs the scope {scope}, this key has "
                    f"{', '.join(sorted(principal.scopes))}"
                )
            permit: Permit = request.state.permit
            await permit.held.enter_async_context(
                gateway.rates.admitted(principal, permit.headers, completion=completion)
            )
            return await handler(request)

        return scoped


async def _who_asks(request: Request, gateway: Gateway) -> Principal:
    principal = Principal()
    if gateway.authentication is not None:
        principal = await gateway.authentication.principal_of(request.headers.get("authorization", ""))
        structlog.contextvars.bind_contextvars(client=principal.client, tenant=principal.tenant)
    request.state.principal = principal
    return principal
