"""Refuses what somebody else's web page has a browser send."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from foundry.errors import PermissionDenied
from foundry.rpc.resolve import is_loopback
from services.gateway.errors import response_of

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
# Orchestrators ask for these by a pod's address.
_PROBED = frozenset({"/health", "/healthz", "/ping", "/readyz"})


class WebPages:
    """Any page may have a browser send simple requests to a gateway that the browser reaches, which name the page
    (`Origin`). If it lets a name of its own point there it may read the answers too: such requests have that name
    (`Host`).

    `Host` must be one of `hosts`, unless there are none; `origins` are pages, besides the gateway's own, that may call.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], origins: Collection[str]) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(Headers(scope=scope), scope["path"])):
            await response_of(PermissionDenied(refusal))(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, headers: Headers, path: str) -> str:
        host = headers.get("host", "")
        if self._hosts and path not in _PROBED and _hostname(host) not in self._hosts:
            return f"{host[:100]!r} is no name of this gateway: those are its allowed_hosts"
        origin = headers.get("origin")
        if origin is None or origin in self._origins or origin in (f"http://{host}", f"https://{host}"):
            return ""
        return f"pages of {origin[:100]!r} may not call this gateway: those of its allowed_origins may"


def hosts_of(listen: str) -> tuple[str, ...]:
    """Names of a gateway that listens on `listen`, host:port: on loopback they are known, elsewhere any may be one."""
    host = _hostname(listen)
    return (*LOOPBACK_HOSTS, host) if is_loopback(host) else ()


def _hostname(host: str) -> str:
    """Without port and brackets, in lower case; "" for what is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
