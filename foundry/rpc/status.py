"""Typed errors on the wire: FoundryError to google.rpc.Status and back.

ErrorInfo.reason names the type, BadRequest the field, RetryInfo when to try again
(https://google.aip.dev/193).
"""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from foundry.errors import (
    BY_REASON,
    Cancelled,
    DeadlineExceeded,
    FoundryError,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from foundry.rpc import tls

_DOMAIN = "foundry"


def to_status(error: FoundryError) -> grpc.Status:
    """What a server aborts with."""
    details = [_any(error_details_pb2.ErrorInfo(reason=error.reason, domain=_DOMAIN))]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(_any(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after_seconds is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(error.retry_after_seconds * 1e9))
        details.append(_any(retry))
    code = code_pb2.Code.Value(error.grpc_code)
    return rpc_status.to_status(status_pb2.Status(code=code, message=error.message, details=details))


def from_rpc_error(error: grpc.aio.AioRpcError, peer: str) -> FoundryError:
    """What a client raises: the server's type where it named one, otherwise the nearest by status code."""
    message = error.details() or "no details"
    if (meaning := tls.meaning(message)) is not None:
        message = f"{meaning} ({message})"
    try:
        reason, field, retry_after_seconds = _details_of(error)
    except (ValueError, DecodeError) as damage:
        # Unreadable, or in contradiction to the code beside it: nobody knows any more what the server said.
        return Unavailable(f"{peer}: a status that was damaged on the way ({damage}): {message}")
    if reason in BY_REASON:
        return BY_REASON[reason](message, field=field, retry_after_seconds=retry_after_seconds)
    nearest: dict[grpc.StatusCode, type[FoundryError]] = {
        grpc.StatusCode.UNAVAILABLE: Unavailable,
        grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
        grpc.StatusCode.CANCELLED: Cancelled,
        # gRPC itself, of frames that make no sense or too large: ours would have named the type.
        grpc.StatusCode.INTERNAL: Unavailable,
        grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
        grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
        # Of a proxy in between.
        grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
        grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    }
    return nearest.get(error.code(), FoundryError)(f"{peer}: {error.code().name}: {message}")


def _details_of(error: grpc.aio.AioRpcError) -> tuple[str | None, str | None, float | None]:
    """Reason, field and seconds to wait, where the server told them. Raises ValueError or DecodeError if damaged."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    reason, field, retry_after_seconds = None, None, None
    for detail in status.details if status is not None else ():
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            reason = info.reason if info.domain == _DOMAIN else None
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
            field = bad.field_violations[0].field if bad.field_violations else None
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after_seconds = retry.retry_delay.ToNanoseconds() / 1e9
    return reason, field, retry_after_seconds


def _any(
    message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
