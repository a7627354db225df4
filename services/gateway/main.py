"""python -m services.gateway.main: parse, build, serve, close."""

from __future__ import annotations

import gc
import socket

import structlog
import uvicorn

from foundry import telemetry
from foundry.errors import PortTaken
from services.gateway.app import build_app
from services.gateway.connections import connections, raise_descriptor_limit
from services.gateway.middleware.web_pages import hosts_of
from services.gateway.settings import GatewaySettings

log = structlog.get_logger(__name__)


def listen(address: str) -> socket.socket:
    """Bind before anything is opened, so that a port that is taken is known at once. Raises PortTaken."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        listener = socket.create_server((host, int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise PortTaken(f"cannot listen on {address}: {error}") from error
    # Its connections inherit it; asyncio sets it on sockets of its own making only. An answer's second packet would
    # wait 40 ms for the client to acknowledge the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def main() -> None:
    settings = GatewaySettings.parse()
    telemetry.start("gateway", settings)
    raise_descriptor_limit(settings.max_connections)
    https = settings.https
    listener = listen(settings.listen)
    config = uvicorn.Config(
        build_app(settings),
        http=connections(settings.max_connections, settings.max_upload_seconds, https),
        log_config=None,
        log_level="warning",
        access_log=False,
        # uvicorn hands it to the loop, which takes parts of seconds.
        timeout_keep_alive=settings.keep_alive_seconds,  # type: ignore[arg-type]
        timeout_graceful_shutdown=round(settings.grace_seconds),
    )
    # What is there now stays. Looked through by a collection, it would hold up all requests for a tenth of a second.
    gc.collect()
    gc.freeze()
    if not settings.api_keys and not hosts_of(settings.listen):
        log.warning("whoever reaches the port may do everything: set api_keys", listen=settings.listen)
    log.info("serving", port=listener.getsockname()[1], https=https is not None)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
