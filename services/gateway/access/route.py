"""Routes that answer those only whose key has the scope."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.security import HTTPBearer

from foundry.errors import PermissionDenied
from services.gateway.access.principal import principal_of
from services.gateway.access.scopes import needed
from services.gateway.bodies import BoundedRoute

# For the documentation, which then asks for a key.
BEARER = HTTPBearer(auto_error=False, scheme_name="API key", description="`fdy_…`, as `foundry keys create` makes it.")


class ScopedRoute(BoundedRoute):
    """Refuses before anything of the body is read, where a dependency would come too late."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        scope = needed(self.methods, self.path)

        async def scoped(request: Request) -> Response:
            has = principal_of(request.scope).scopes
            if scope not in has:
                raise PermissionDenied(
                    f"{request.method} {request.url.path} needs the scope {scope}, this key has "
                    f"{', '.join(sorted(has)) or 'none'}"
                )
            return await handler(request)

        return scoped
