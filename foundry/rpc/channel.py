"""Client side: a channel whose calls need a deadline and raise FoundryError."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc
from grpc.aio import Metadata
from grpc_health.v1 import health_pb2, health_pb2_grpc

from foundry.errors import AlignmentError, DeadlineExceeded
from foundry.rpc.access import authorization
from foundry.rpc.context import outgoing
from foundry.rpc.limits import CHANNEL_OPTIONS
from foundry.rpc.resolve import host_of
from foundry.rpc.status import from_rpc_error
from foundry.rpc.tls import Credentials

T = TypeVar("T")


def open_channel(
    address: str, credentials: Credentials | None = None, *, server_name: str = "", token: str | None = None
) -> grpc.aio.Channel:
    """A channel to `host:port`; every call must pass `timeout` (seconds), and shows `token`.

    With credentials in mutual TLS, where the server's certificate must carry `server_name`, by default the host.
    """
    interceptors = [_Prepare(token), _PrepareStream(token)]
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS, interceptors=interceptors)
    options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", server_name or host_of(address)))
    return grpc.aio.secure_channel(address, credentials.for_channel(), options=options, interceptors=interceptors)


@contextmanager
def typed_errors(peer: str) -> Iterator[None]:
    """Within it, a failed call raises the FoundryError that the server meant. `peer` names the server in messages."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, peer) from error


def decoded(message: T | None, peer: str) -> T:
    """The message. Raises AlignmentError where gRPC hands out None for one whose bytes it could not read."""
    if message is None:
        raise AlignmentError(f"{peer} sent a message that was damaged on the way")
    return message


async def wait_until_serving(channel: grpc.aio.Channel, peer: str, *, timeout_seconds: float) -> None:
    """Return when the peer's health service says SERVING. Raises DeadlineExceeded."""
    with typed_errors(peer):
        watch = health_pb2_grpc.HealthStub(channel).Watch(  # type: ignore[attr-defined]
            health_pb2.HealthCheckRequest(), timeout=timeout_seconds, wait_for_ready=True
        )
        async for answer in watch:
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                watch.cancel()
                return
    raise DeadlineExceeded(f"{peer} was not ready within {timeout_seconds:.0f} s")


def _prepared(details: grpc.aio.ClientCallDetails, token: str | None) -> grpc.aio.ClientCallDetails:
    if details.timeout is None:
        raise ValueError(f"call to {details.method!r} without a deadline: pass timeout=")
    metadata = outgoing(details.metadata)
    if token is not None:
        metadata = Metadata(*(metadata or ()), authorization(token))
    return grpc.aio.ClientCallDetails(
        method=details.method,
        timeout=details.timeout,
        metadata=metadata,
        credentials=details.credentials,
        wait_for_ready=details.wait_for_ready,
    )


class _Prepare(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, token: str | None) -> None:
        self._token = token

    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(_prepared(details, self._token), request)


class _PrepareStream(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, token: str | None) -> None:
        self._token = token

    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(_prepared(details, self._token), request)
