"""The lines of a batch: requests in its input, answers and errors in its output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from foundry.errors import InvalidArgument
from services.gateway.bodies import parse

_MAX_ERRORS = 100
_MAX_ID_CHARACTERS = 512
_KEYS = {"custom_id", "method", "url", "body"}


@dataclass(frozen=True, slots=True)
class BatchLine:
    """Where it stands in the file, in bytes."""

    custom_id: str
    begin: int
    end: int


def read_lines(
    content: memoryview, *, endpoint: str, max_lines: int, max_line_bytes: int
) -> tuple[list[BatchLine], list[dict[str, Any]]]:
    """The requests of a file, and what is wrong with it: then nothing of it is begun.

    Errors are {code, line, message, param}, the first hundred. What the body says is checked when it is its turn.
    """
    lines: list[BatchLine] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, (begin, end) in enumerate(_places(content), start=1):
        if len(errors) >= _MAX_ERRORS:
            break
        if len(lines) >= max_lines:
            errors.append(_error("too_many_requests", number, f"a batch has at most {max_lines} requests"))
            break
        try:
            custom_id = _checked(content[begin:end], endpoint, max_line_bytes)
        except InvalidArgument as error:
            errors.append(_error("invalid_request", number, error.message, error.field))
            continue
        if custom_id in seen:
            errors.append(_error("duplicate_custom_id", number, f"{custom_id!r} stands in two lines", "custom_id"))
        seen.add(custom_id)
        lines.append(BatchLine(custom_id, begin, end))
    if not lines and not errors:
        errors.append(_error("empty_file", None, "the file has no requests"))
    return lines, errors


def body_of(content: memoryview, line: BatchLine) -> dict[str, Any]:
    body: dict[str, Any] = parse(bytes(content[line.begin : line.end]))["body"]
    return body


def answered(line: BatchLine, status: int, request_id: str, body: Mapping[str, Any]) -> str:
    """A line of the output, or of the errors where the status says so."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return _written(line, response, None)


def unanswered(line: BatchLine, code: str, message: str) -> str:
    """A line of the errors, of a request that was not begun."""
    return _written(line, None, {"code": code, "message": message})


def _written(line: BatchLine, response: Mapping[str, Any] | None, error: Mapping[str, Any] | None) -> str:
    entry = {"id": f"batch_req_{uuid4().hex}", "custom_id": line.custom_id, "response": response, "error": error}
    return json.dumps(entry, ensure_ascii=False)


def _places(content: memoryview) -> list[tuple[int, int]]:
    """Where the lines begin and end that are not empty."""
    places, begin = [], 0
    for piece in bytes(content).split(b"\n"):
        if piece.strip():
            places.append((begin, begin + len(piece)))
        begin += len(piece) + 1
    return places


def _checked(line: memoryview, endpoint: str, max_bytes: int) -> str:
    """The id of a request. Raises InvalidArgument."""
    if line.nbytes > max_bytes:
        raise InvalidArgument(f"the line has {line.nbytes} bytes, a request at most {max_bytes}")
    request = parse(bytes(line))
    if not isinstance(request, dict) or not request.keys() <= _KEYS:
        raise InvalidArgument("expected a JSON object with custom_id, method, url and body")
    custom_id = request.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_ID_CHARACTERS or not _is_unicode(custom_id):
        raise InvalidArgument(f"custom_id must be 1 to {_MAX_ID_CHARACTERS} characters", field="custom_id")
    if request.get("method") != "POST":
        raise InvalidArgument("method must be POST", field="method")
    if request.get("url") != endpoint:
        raise InvalidArgument(f"url must be the batch's endpoint, {endpoint}", field="url")
    if not isinstance(request.get("body"), dict):
        raise InvalidArgument("body must be a JSON object", field="body")
    return custom_id


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _error(code: str, line: int | None, message: str, param: str | None = None) -> dict[str, Any]:
    return {"code": code, "line": line, "message": message, "param": param}
