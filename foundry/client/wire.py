"""What goes over the wire, and what comes back, without the wire: shared by the clients that wait and that don't."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from foundry.errors import BY_REASON, DocumentUnreadable, FoundryError, InvalidArgument, Unavailable

Json = dict[str, Any]
# The gateway sends a comment every 15 s into a silent event stream.
EVENTS_SILENCE_SECONDS = 60.0
EVENTS_RECONNECTS = 5
# Entries of a list asked for at a time: as many as the gateway gives.
PAGE = 1000
# What a header can carry; none where the gateway asks for none.
_API_KEY = re.compile(r"[!-~]*")
_DEFAULT_URL = "http://127.0.0.1:8000"


def options(base_url: str | None, api_key: str | None, timeout_seconds: float) -> Json:
    """How httpx's clients are made. Raises InvalidArgument."""
    url = _base_url(os.environ.get("FOUNDRY_GATEWAY") or _DEFAULT_URL if base_url is None else base_url)
    key = os.environ.get("FOUNDRY_API_KEY", "") if api_key is None else api_key
    # httpx would say what it can't send.
    if not _API_KEY.fullmatch(key):
        raise InvalidArgument("the API key has characters that no key has", field="api_key")
    return {
        "base_url": url,
        "headers": {"authorization": f"Bearer {key}"} if key else {},
        "timeout": httpx.Timeout(timeout_seconds, connect=10.0),
        # Authorities of the environment (SSL_CERT_FILE) are for any gateway.
        "verify": httpx.create_ssl_context() if url.scheme == "https" else False,
        # A proxy of the environment leads out, never to this machine.
        "trust_env": url.host not in ("127.0.0.1", "localhost", "::1"),
    }


def _base_url(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, ValueError) as error:
        raise InvalidArgument(f"{text!r:.200} is not a URL: {error}", field="base_url") from error
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise InvalidArgument(
            f"{text!r:.200} is not a gateway's address: expected one such as {_DEFAULT_URL}", field="base_url"
        )
    # As OpenAI's clients are told it; paths begin with it here.
    return url.copy_with(path=url.path.rstrip("/").removesuffix("/v1"))


def body(values: Mapping[str, Any]) -> bytes:
    """JSON. Raises InvalidArgument for what it can't hold: NaN, half a surrogate pair, what is no JSON value."""
    for name, value in values.items():
        try:
            _encode(value)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"{name} can't be sent as JSON: {error}", field=name) from error
    return _encode(values)


def _encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def utf8(value: str | bytes, field: str) -> bytes:
    """Raises InvalidArgument for half a surrogate pair, which is no character. Bytes are as the caller has them."""
    try:
        return value.encode() if isinstance(value, str) else value
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{field} is not Unicode text: {error}", field=field) from error


def spec_of(document: str | bytes | Path, name: str, spec: Json) -> Json:
    """A run for a text, or for the text of a file. Raises DocumentUnreadable."""
    if isinstance(document, Path):
        spec = {"title": document.name, **spec}
        try:
            document = document.read_bytes()
        except OSError as error:
            raise DocumentUnreadable(f"{error.filename} can't be read: {error.strerror}", field="document") from error
    try:
        text = document.decode() if isinstance(document, bytes) else document
    except UnicodeDecodeError as error:
        raise DocumentUnreadable(f"the document is not text in UTF-8: {error}", field="document") from error
    return {"text": text, "name": name, **spec}


def error_of(response: httpx.Response, content: bytes) -> FoundryError:
    try:
        error = json.loads(content)["error"]
        retry_after = response.headers.get("retry-after", "")
        return stream_error(error, float(retry_after) if retry_after.isdecimal() else None)
    except (ValueError, KeyError, TypeError, AttributeError):
        # Not our gateway, or a proxy before it.
        text = content[:200].decode(errors="replace")
        kind = Unavailable if response.status_code in (502, 503, 504) else FoundryError
        return kind(f"{response.request.url} answered {response.status_code}: {text}")


def stream_error(error: Json, retry_after_seconds: float | None = None) -> FoundryError:
    """Of an error object."""
    kind = BY_REASON.get(error.get("code") or "", FoundryError)
    return kind(error["message"], field=error.get("param"), retry_after_seconds=retry_after_seconds)


def run_error(run: Mapping[str, Any]) -> FoundryError:
    """Why a run failed, as the type that its worker raised."""
    reason, _, message = str(run["error"]).partition(": ")
    return BY_REASON.get(reason, FoundryError)(f"{run['id']} failed: {message or reason}")


@dataclass(frozen=True, slots=True)
class ServerEvent:
    data: str
    id: str


class EventParser:
    """Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html), comments left out.

    Not `iter_lines`: it also splits at U+2028 and its like, which JSON may contain.
    """

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, content: bytes) -> Iterator[ServerEvent]:
        *blocks, self._buffer = (self._buffer + content).split(b"\n\n")
        for block in blocks:
            fields: dict[str, list[str]] = {}
            for line in block.decode().split("\n"):
                name, _, value = line.partition(":")
                fields.setdefault(name, []).append(value.removeprefix(" "))
            if "data" in fields:
                yield ServerEvent("\n".join(fields["data"]), fields.get("id", [""])[-1])
