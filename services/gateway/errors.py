"""Every failure as an OpenAI error object: {"error": {"message", "type", "param", "code"}}.

`code` is the reason of `foundry.errors`, from which a client raises the same type again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import cast

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.routing import Match

from foundry.errors import DocumentTooLong, FoundryError, InvalidArgument, NotFound, Unauthenticated, Unavailable
from foundry.validation import OWN_ERRORS, invalid_argument
from services.gateway import metrics

log = structlog.get_logger(__name__)

# Characters. What is said comes first, what was sent after it.
_MAX_MESSAGE = 1000


class RequestTooLarge(InvalidArgument):
    """The body is larger than the gateway takes."""

    http_status = 413


class Refused(HTTPException):
    """A typed error while a body is read: FastAPI passes on only this type from there."""

    def __init__(self, error: FoundryError) -> None:
        super().__init__(error.http_status, error.message)
        self.error = error


class UnsupportedMediaType(InvalidArgument):
    """The body is of a kind that the route does not read."""

    http_status = 415


class NothingMore(HTTPException):
    """Not a failure: an answer of 204, from where only an exception can say that there is nothing to stream."""

    def __init__(self) -> None:
        super().__init__(204)


class DocumentTooLarge(DocumentTooLong):
    """The document has more bytes than the store takes."""

    http_status = 413


class MethodNotAllowed(InvalidArgument):
    """The path exists, but not for this method."""

    http_status = 405


class ClusterUnavailable(Unavailable):
    """The Kubernetes API can't be reached, or fails; the same call may succeed later."""


class ClusterRefused(ClusterUnavailable):
    """The Kubernetes API answers, but refuses: a missing right, a quota, a manifest that it does not take."""


@contextmanager
def naming(param: str) -> Iterator[None]:
    """What is not found within is what the request's `param` names, whatever it is called where it was looked for."""
    try:
        yield
    except NotFound as error:
        error.field = param
        raise


def install(app: FastAPI) -> None:
    app.add_exception_handler(FoundryError, _on_foundry_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_unexpected)


def error_body(error: FoundryError) -> dict[str, dict[str, str | None]]:
    return {
        "error": {
            "message": _writable(error.message),
            "type": _type_of(error.http_status),
            "param": None if error.field is None else _writable(error.field),
            "code": error.reason,
        }
    }


def response_of(error: FoundryError, headers: Mapping[str, str] = MappingProxyType({})) -> JSONResponse:
    metrics.ERRORS.labels(error.reason).inc()
    headers = dict(headers)
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    if error.retry_after_seconds is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_seconds)))
    return JSONResponse(error_body(error), status_code=error.http_status, headers=headers)


def _writable(text: str) -> str:
    """Messages name what was sent, which may hold half a surrogate pair and be long."""
    return text[:_MAX_MESSAGE].encode(errors="replace").decode()


def _type_of(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


async def _on_foundry_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, FoundryError)
    if error.http_status >= 500:
        log.warning("request failed", path=request.url.path, reason=error.reason, error=error.message)
    return response_of(error)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    _, *path = first["loc"]
    if not path and first["type"] not in OWN_ERRORS:
        return response_of(InvalidArgument(f"the body must be a JSON object sent as application/json: {first['msg']}"))
    return response_of(invalid_argument(cast(ErrorDetails, first | {"loc": tuple(path)})))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What Starlette raises itself: no such route, wrong method, a body that can't be read."""
    assert isinstance(error, HTTPException)
    if isinstance(error, NothingMore):
        return Response(status_code=204)
    if isinstance(error, Refused):
        return response_of(error.error)
    if error.status_code == 404:
        return response_of(NotFound(f"there is no {request.method} {request.url.path}"))
    if error.status_code == 405:
        allowed = ", ".join(_methods_of(request))
        error = MethodNotAllowed(f"{request.url.path} takes {allowed}, not {request.method}")
        return response_of(error, {"allow": allowed})
    return response_of(InvalidArgument(error.detail))


def _methods_of(request: Request) -> list[str]:
    """All that any route of the path takes: Starlette itself says the first one's only."""
    scope = dict(request.scope)

    def takes(method: str) -> bool:
        return any(route.matches(scope | {"method": method})[0] is Match.FULL for route in request.app.routes)

    methods = [method for method in ("GET", "POST", "PUT", "DELETE") if takes(method)]
    return [*methods, "HEAD"] if "GET" in methods else methods


async def _on_unexpected(request: Request, error: Exception) -> JSONResponse:
    # Starlette raises it again after this answer, so that it is logged with its traceback.
    return response_of(FoundryError("the gateway failed; its log says why"))
