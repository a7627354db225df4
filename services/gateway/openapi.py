"""The OpenAPI page: every route with the statuses that it answers with, and what an error looks like."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel

Json = dict[str, Any]


class ErrorDetails(BaseModel):
    """What went wrong, as OpenAI writes it."""

    message: str
    """For people."""

    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    """Whose fault it is."""

    param: str | None
    """The parameter at fault, written with dots where it is a part of another."""

    code: str
    """The error's kind, which clients tell by."""


class ErrorBody(BaseModel):
    """Every answer of 400 and above."""

    error: ErrorDetails


# What any route may answer: a request that can't be read, a page that may not call, a client that is slow or asks too
# often, a fault, a store or server that is away.
_ANYWHERE = (400, 403, 408, 429, 500, 503)
_COMPONENTS = "#/components/schemas/"
_SCHEMA = {"application/json": {"schema": {"$ref": f"{_COMPONENTS}{ErrorBody.__name__}"}}}


# Of what may also be asked for as a stream.
EVENTS: dict[int | str, Json] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


def failures(*statuses: int) -> dict[int | str, Json]:
    """For `responses` of a route: what it answers besides what any may."""
    return {status: _failure(status) for status in statuses}


def _failure(status: int) -> Json:
    # Not by FastAPI's `model`, which is of the media type that the route's good answers have.
    return {"description": HTTPStatus(status).phrase, "content": _SCHEMA}


def complete(app: FastAPI) -> None:
    """Have the page of `app` say all this."""
    generate = app.openapi

    def openapi() -> Json:
        schema = generate()
        for path in schema["paths"].values():
            for operation in path.values():
                _complete(operation["responses"], has_body="requestBody" in operation, has_keys="security" in operation)
        schemas = schema["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        error = ErrorBody.model_json_schema(ref_template=f"{_COMPONENTS}{{model}}")
        schemas.update(error.pop("$defs") | {ErrorBody.__name__: error})
        return schema

    # FastAPI's own way to extend it.
    app.openapi = openapi  # type: ignore[method-assign]


def _complete(responses: Json, *, has_body: bool, has_keys: bool) -> None:
    # FastAPI's own, which are 400 here.
    responses.pop("422", None)
    for status in (*_ANYWHERE, *([413] if has_body else []), *([401] if has_keys else [])):
        responses.setdefault(str(status), _failure(status))
