"""Notes in the audit log what changes something, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from structlog.contextvars import get_contextvars

from services.gateway.access.audit import AuditLog
from services.gateway.access.scopes import COMPLETIONS, OPEN
from services.gateway.middleware.answered import answered

_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_REFUSED = frozenset({401, 403, 429})
# Whatever else a path holds was sent by mistake, and may be a secret.
_NAMES_SOMETHING = re.compile(r"(?!.*fdy_)[A-Za-z0-9._:@/-]{1,200}")


class Audit:
    """Stands within what names the request, and about all that refuses."""

    def __init__(self, app: ASGIApp, audit: AuditLog, completions: bool) -> None:
        """`completions` notes them too, not only those that are refused."""
        self._app = app
        self._audit = audit
        self._completions = completions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        def note(status: int) -> None:
            if status in _REFUSED or self._is_noted(scope):
                self._audit.add(_entry(scope, status))

        await answered(self._app, scope, receive, send, note)

    def _is_noted(self, scope: Scope) -> bool:
        path = getattr(scope.get("route"), "path", None)
        # Those that are open change nothing, also where they are asked by POST.
        if path is None or path in OPEN or scope["method"] in _READS:
            return False
        return self._completions or path not in COMPLETIONS


def _entry(scope: Scope, status: int) -> dict[str, Any]:
    # Bound by what authenticates, names and makes.
    bound = get_contextvars()
    return {
        "client": bound.get("client", ""),
        "tenant": bound.get("tenant"),
        "method": scope["method"] if re.fullmatch("[A-Z]{1,20}", scope["method"]) else "other",
        "route": getattr(scope.get("route"), "path", "unmatched"),
        "object": _named(scope.get("path_params", {})),
        "made": {kind: bound[kind] for kind in ("run_id", "document") if kind in bound},
        "status": status,
        "request_id": bound["request_id"],
        "address": scope["client"][0] if scope.get("client") else "",
    }


def _named(path_params: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: str(value) if _NAMES_SOMETHING.fullmatch(str(value)) else "invalid" for name, value in path_params.items()
    }
