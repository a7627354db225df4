"""Server side: one gRPC server with health, access by role and typed errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import structlog
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from foundry.errors import FoundryError, InvalidArgument, PortTaken
from foundry.rpc import metrics
from foundry.rpc.access import Access
from foundry.rpc.context import bind_request, entered
from foundry.rpc.limits import SERVER_OPTIONS
from foundry.rpc.resolve import is_loopback
from foundry.rpc.status import to_status
from foundry.rpc.tls import Tls

log = structlog.get_logger(__name__)


class Server:
    """Listens at once, says NOT_SERVING until `set_serving`, ends calls within a grace period on `stop`."""

    def __init__(
        self,
        address: str,
        services: Sequence[ServiceDescriptor],
        tls: Tls | None = None,
        *,
        access: Access | None = None,
        reflect: bool = False,
    ) -> None:
        """Raises PortTaken. Register the servicers on `.grpc` before `start`; `port` is the one bound.

        With `tls` only clients with a certificate of its authority are answered, with `access` only those whose role
        may make the call. With `reflect` tools can ask which services there are.
        """
        if access is None and services and not is_loopback(address.rpartition(":")[0].strip("[]")):
            log.warning("whoever reaches the port may call everything: set rpc_tokens_directory", listen=address)
        self.grpc = grpc.aio.server(options=SERVER_OPTIONS, interceptors=[_Calls(access)])
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        self._names = ["", *(service.full_name for service in services)]
        if reflect:
            listed = (*self._names[1:], health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(listed, self.grpc)
        try:
            if tls is None:
                self.port = self.grpc.add_insecure_port(address)
            else:
                self.port = self.grpc.add_secure_port(address, tls.server_credentials())
        except RuntimeError as error:
            raise PortTaken(f"cannot listen on {address}: is another server running there?") from error

    async def start(self) -> None:
        await self.set_not_serving()
        await self.grpc.start()

    async def set_serving(self) -> None:
        await self._set(health_pb2.HealthCheckResponse.SERVING)

    async def set_not_serving(self) -> None:
        """Calls are still answered; those who balance by health send no more."""
        await self._set(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def stop(self, grace_seconds: float) -> None:
        await self._health.enter_graceful_shutdown()
        await self.grpc.stop(grace_seconds)

    async def _set(self, status: int) -> None:
        for name in self._names:
            await self._health.set(name, status)


class _Calls(grpc.aio.ServerInterceptor):
    """Refuses who may not call, turns a FoundryError into its status, counts and times every call of ours.

    gRPC would end a call whose message can't be parsed as a fault of the server, with a traceback. So it hands out
    bytes, which are parsed here, where errors are typed.
    """

    def __init__(self, access: Access | None) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(details)
        if handler is None:
            return None
        method, ours = details.method.rsplit("/", 1)[-1], details.method.startswith("/foundry.")
        refusal = self._access.refusal(details.method, details.invocation_metadata) if self._access else None
        parse = _parser(handler.request_deserializer, refusal)
        make: Callable[..., grpc.RpcMethodHandler[Any, Any]]
        if handler.request_streaming:
            # Reflection: no call of ours streams requests.
            make = grpc.stream_stream_rpc_method_handler
            behaviour = _parsed_stream(handler.stream_stream, method, parse)
        elif handler.response_streaming:
            make = grpc.unary_stream_rpc_method_handler
            behaviour = (_stream if ours else _parsed)(handler.unary_stream, method, parse)
        else:
            make = grpc.unary_unary_rpc_method_handler
            behaviour = (_unary if ours else _parsed)(handler.unary_unary, method, parse)
        return make(behaviour, response_serializer=handler.response_serializer)


def _parser(deserialize: Callable[[bytes], Any] | None, refusal: FoundryError | None) -> Callable[[bytes], Any]:
    """Of a call that is refused nothing is read. Without a deserializer a handler takes the bytes, as gRPC has it."""

    def parse(content: bytes) -> Any:
        if refusal is not None:
            raise refusal
        try:
            return content if deserialize is None else deserialize(content)
        except DecodeError:
            raise InvalidArgument("the request is not the protobuf message that the method takes") from None

    return parse


def _unary(behaviour: Any, method: str, parse: Callable[[bytes], Any]) -> Any:
    async def call(content: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            with entered(method, context.invocation_metadata()), _observed(method):
                request = parse(content)
                bind_request(request)
                return await behaviour(request, context)
        except FoundryError as error:
            await _abort(context, method, error)

    return call


def _stream(behaviour: Any, method: str, parse: Callable[[bytes], Any]) -> Any:
    async def call(content: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            with entered(method, context.invocation_metadata()), _observed(method):
                request = parse(content)
                bind_request(request)
                async for answer in behaviour(request, context):
                    yield answer
        except FoundryError as error:
            await _abort(context, method, error)

    return call


def _parsed(behaviour: Any, method: str, parse: Callable[[bytes], Any]) -> Any:
    """Of a coroutine that is not ours, whether it returns its answer or writes several."""

    async def call(content: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behaviour(parse(content), context)
        except FoundryError as error:
            await _abort(context, method, error)

    return call


def _parsed_stream(behaviour: Any, method: str, parse: Callable[[bytes], Any]) -> Any:
    async def call(contents: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            async for answer in behaviour((parse(content) async for content in contents), context):
                yield answer
        except FoundryError as error:
            await _abort(context, method, error)

    return call


@contextmanager
def _observed(method: str) -> Iterator[None]:
    began = time.perf_counter()
    code, reason = "OK", ""
    try:
        yield
    except FoundryError as error:
        code, reason = error.grpc_code, error.reason
        raise
    except (asyncio.CancelledError, GeneratorExit):
        # The client went away, or its time is over.
        code = "CANCELLED"
        raise
    except Exception:
        code, reason = "UNKNOWN", "INTERNAL"
        raise
    finally:
        metrics.SERVER_SECONDS.labels(method, code).observe(time.perf_counter() - began)
        if reason:
            metrics.SERVER_ERRORS.labels(method, reason).inc()


async def _abort(context: grpc.aio.ServicerContext[Any, Any], method: str, error: FoundryError) -> None:
    log.warning("rpc failed", method=method, reason=error.reason, error=error.message)
    status = to_status(error)
    context.set_trailing_metadata(status.trailing_metadata)
    await context.abort(status.code, status.details)
