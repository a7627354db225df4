"""The SDK: a synchronous client of the gateway.

Failures are raised as the types of `foundry.errors` that the services raised.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import quote

import httpx

from foundry.errors import BY_REASON, DeadlineExceeded, FoundryError, InvalidArgument, Unavailable

Json = dict[str, Any]
# The gateway sends a comment every 15 s into a silent event stream.
_EVENTS_SILENCE_SECONDS = 60.0
_EVENTS_RECONNECTS = 5
# Entries of a list asked for at a time.
_PAGE = 1000
# What a header can carry; none where the gateway asks for none.
_API_KEY = re.compile(r"[!-~]*")


@dataclass(frozen=True, slots=True)
class CartridgeVersion:
    name: str
    version: int
    digest: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """An answer, what it was computed with and what it cost. `seconds` are since the request was sent."""

    text: str
    finish_reason: str
    model: str
    model_fingerprint: str
    template_digest: str
    cartridges: tuple[CartridgeVersion, ...]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cartridge_tokens: int
    seconds_to_first_token: float
    seconds: float


class ChatStream:
    """Iterate over the text as it comes; then `answer` is set. Leaving the iteration early cancels the generation."""

    def __init__(self, http: _Http, body: Json) -> None:
        self._http = http
        self._body = body
        self.answer: ChatAnswer | None = None

    def __iter__(self) -> Iterator[str]:
        began = time.monotonic()
        first_token_at: float | None = None
        text, finish_reason, done = "", "", False
        foundry: Json = {}
        usage: Json = {}
        with self._http.stream("POST", "/v1/chat/completions", json=self._body) as response:
            for event in _events(response):
                if event.data == "[DONE]":
                    done = True
                    break
                chunk = json.loads(event.data)
                if "error" in chunk:
                    raise _error(chunk["error"], None)
                first_token_at = first_token_at or time.monotonic()
                foundry = chunk.get("foundry", foundry)
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    finish_reason = choice["finish_reason"] or finish_reason
                    if delta := choice["delta"].get("content"):
                        text += delta
                        yield delta
        if not done or first_token_at is None:
            raise Unavailable("the gateway ended the answer before it was complete")
        self.answer = ChatAnswer(
            text=text,
            finish_reason=finish_reason,
            model=self._body["model"],
            model_fingerprint=foundry["model_fingerprint"],
            template_digest=foundry["template_digest"],
            cartridges=tuple(CartridgeVersion(**cartridge) for cartridge in foundry["cartridges"]),
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
            cartridge_tokens=foundry["cartridge_tokens"],
            seconds_to_first_token=first_token_at - began,
            seconds=time.monotonic() - began,
        )


class FoundryClient:
    """`with FoundryClient(url) as client: client.chat("handbook@latest", "What ...?").text`"""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        """`api_key` is what the gateway is shown, FOUNDRY_API_KEY's where that is set; `timeout_seconds` the longest
        silence that is waited out. Raises InvalidArgument for a key that can't be sent.

        Calls raise Unauthenticated where the gateway does not take the key, PermissionDenied where it lacks the scope.
        """
        self._http = _Http(
            base_url, os.environ.get("FOUNDRY_API_KEY", "") if api_key is None else api_key, timeout_seconds
        )
        self.documents = Documents(self._http)
        self.cartridges = Cartridges(self._http)
        self.runs = Runs(self._http)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[Json]:
        """The base model first, then every cartridge."""
        return self._http.listing("/v1/models")

    def ready(self) -> Json:
        """{status, reasons} of the gateway, ready or not. Raises Unavailable if there is none."""
        return self._http.json("GET", "/readyz", expect=(200, 503))

    def chat(self, model: str, messages: str | Sequence[Mapping[str, str]], **options: Any) -> ChatAnswer:
        """The whole answer. `messages` may be the user's words alone; options as in `stream_chat`."""
        stream = self.stream_chat(model, messages, **options)
        for _ in stream:
            pass
        assert stream.answer is not None
        return stream.answer

    def stream_chat(self, model: str, messages: str | Sequence[Mapping[str, str]], **options: Any) -> ChatStream:
        """The answer as it comes. `options` are the API's: max_tokens, temperature, seed, stop, cartridges ..."""
        if "n" in options:
            raise InvalidArgument("this client takes one choice at a time", field="n")
        spoken = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(m) for m in messages]
        body = {"model": model, "messages": spoken, **options}
        return ChatStream(self._http, body | {"stream": True, "stream_options": {"include_usage": True}})


class Documents:
    def __init__(self, http: _Http) -> None:
        self._http = http

    def create(self, text: str | bytes, *, title: str = "") -> Json:
        """{digest, title, num_bytes, created_at}. Raises DocumentUnreadable, DocumentTooLong."""
        content = text.encode() if isinstance(text, str) else text
        headers = {"content-type": "text/plain; charset=utf-8"}
        return self._http.json("POST", "/v1/documents", params={"title": title}, content=content, headers=headers)

    def get(self, digest: str) -> Json:
        return self._http.json("GET", f"/v1/documents/{quote(digest)}")

    def text(self, digest: str) -> str:
        with self._http.stream("GET", f"/v1/documents/{quote(digest)}/content") as response:
            return response.read().decode()

    def delete(self, digest: str) -> None:
        """Cartridges that were trained on it stay."""
        self._http.json("DELETE", f"/v1/documents/{quote(digest)}")

    def list(self) -> list[Json]:
        return self._http.listing("/v1/documents")


class Cartridges:
    def __init__(self, http: _Http) -> None:
        self._http = http

    def get(self, reference: str) -> Json:
        """{name, tags, version: manifest, lineage, durable, hot} of what a reference means now."""
        return self._http.json("GET", _cartridge(reference))

    def versions(self, name: str) -> list[Json]:
        """Manifests, oldest first."""
        return self._http.listing(f"{_cartridge(name)}/versions")

    def tag(self, name: str, tag: str, version: int) -> Json:
        """{version, previous}: what the tag means now and what it meant before, or None."""
        return self._http.json("PUT", f"{_cartridge(name)}/tags/{quote(tag, safe='')}", json={"version": version})

    def tag_history(self, name: str, tag: str) -> Json:
        """{version, history}: what the tag means and, newest first, what it meant before."""
        return self._http.json("GET", f"{_cartridge(name)}/tags/{quote(tag, safe='')}")

    def rollback_tag(self, name: str, tag: str) -> Json:
        """Let the tag mean what it meant before: {version, previous}. Raises Conflict if there is no such version."""
        return self._http.json("POST", f"{_cartridge(name)}/tags/{quote(tag, safe='')}/rollback")

    def rollback(self, name: str, to: str) -> Json:
        """Publish an older version's bytes (its number, a tag or a digest) as a new version; its manifest.

        Raises Conflict while a run holds the name.
        """
        return self._http.json("POST", f"{_cartridge(name)}/rollback", json={"to": to})

    def untag(self, name: str, tag: str) -> None:
        self._http.json("DELETE", f"{_cartridge(name)}/tags/{quote(tag, safe='')}")

    def delete(self, name: str, version: int | None = None) -> None:
        """One version, or the name with all of them."""
        self._http.json("DELETE", _cartridge(name) + (f"/versions/{version}" if version is not None else ""))

    def grant(self, name: str, tenant: str) -> Json:
        """Let another tenant query the cartridge, and nothing else: {name, tenant, granted_at}."""
        return self._http.json("PUT", f"{_cartridge(name)}/grants/{quote(tenant, safe='')}")

    def ungrant(self, name: str, tenant: str) -> None:
        """Raises GrantNotFound."""
        self._http.json("DELETE", f"{_cartridge(name)}/grants/{quote(tenant, safe='')}")

    def grants(self, name: str) -> list[Json]:
        """By tenant."""
        return self._http.listing(f"{_cartridge(name)}/grants")

    # Last, because after it `list` means this method.
    def list(self) -> list[Json]:
        return self._http.listing("/v1/cartridges")


class Runs:
    def __init__(self, http: _Http) -> None:
        self._http = http

    def create(self, **spec: Any) -> Json:
        """Queue a run: the keys of a run specification, with `document` (a digest) or `text`."""
        return self._http.json("POST", "/v1/runs", json=spec)

    def get(self, run_id: str) -> Json:
        return self._http.json("GET", _run(run_id))

    def list(self) -> list[Json]:
        return self._http.listing("/v1/runs")

    def cancel(self, run_id: str) -> Json:
        return self._http.json("POST", f"{_run(run_id)}/cancel")

    def pause(self, run_id: str) -> Json:
        return self._http.json("POST", f"{_run(run_id)}/pause")

    def resume(self, run_id: str) -> Json:
        return self._http.json("POST", f"{_run(run_id)}/resume")

    def delete(self, run_id: str) -> None:
        """The versions that it published stay. Raises Conflict unless it is over."""
        self._http.json("DELETE", _run(run_id))

    def events(self, run_id: str, *, after: str | None = None) -> Iterator[Json]:
        """What happened and happens, until the run has ended, each with its `id`; `after` is the last id already seen.

        A connection that breaks is made again where it broke. Raises Unavailable if that keeps failing.
        """
        reconnects = 0
        while True:
            headers = {"last-event-id": after} if after else {}
            try:
                with self._http.stream(
                    "GET", f"{_run(run_id)}/events", headers=headers, timeout=_EVENTS_SILENCE_SECONDS
                ) as response:
                    if response.status_code == httpx.codes.NO_CONTENT:
                        # The run has ended, and all that happened in it was seen.
                        return
                    for item in _events(response):
                        after, reconnects = item.id, 0
                        event = json.loads(item.data)
                        yield {"id": item.id, **event}
                        if event.get("type") == "finished":
                            return
                raise Unavailable(f"the event stream of {run_id} ended before the run")
            except (Unavailable, DeadlineExceeded):
                reconnects += 1
                if reconnects > _EVENTS_RECONNECTS:
                    raise
                time.sleep(min(0.1 * 2**reconnects, 2.0))

    def wait(self, run_id: str) -> Json:
        """The run, once it has ended."""
        for _ in self.events(run_id):
            pass
        return self.get(run_id)


def _cartridge(reference: str) -> str:
    # A tenant's slash is part of the path; ':' and '@' may stand in one as they are.
    return f"/v1/cartridges/{quote(reference, safe='/:@')}"


def _run(run_id: str) -> str:
    return f"/v1/runs/{quote(run_id, safe='')}"


class _Http:
    """httpx with our errors."""

    def __init__(self, base_url: str, api_key: str, timeout_seconds: float) -> None:
        # httpx would say what it can't send.
        if not _API_KEY.fullmatch(api_key):
            raise InvalidArgument("the API key has characters that no key has", field="api_key")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._base_url = base_url
        # A proxy of the environment leads out, never to this machine.
        local = httpx.URL(base_url).host in ("127.0.0.1", "localhost", "::1")
        timeout = httpx.Timeout(timeout_seconds, connect=10.0)
        # Authorities of the environment (SSL_CERT_FILE) are for any gateway.
        verify = httpx.create_ssl_context()
        self._client = httpx.Client(
            base_url=base_url, headers=headers, timeout=timeout, verify=verify, trust_env=not local
        )

    def close(self) -> None:
        self._client.close()

    def json(self, method: str, path: str, *, expect: Sequence[int] = (), **arguments: Any) -> Json:
        with self.stream(method, path, expect=expect, **arguments) as response:
            content = response.read()
        answer: Json = json.loads(content) if content else {}
        return answer

    def listing(self, path: str) -> list[Json]:
        """All entries, page after page."""
        data: list[Json] = []
        asked: dict[str, Any] = {"limit": _PAGE}
        while True:
            page = self.json("GET", path, params=asked)
            data += page["data"]
            if not page.get("has_more"):
                return data
            asked["after"] = page["last_id"]

    @contextmanager
    def stream(
        self, method: str, path: str, *, expect: Sequence[int] = (), **arguments: Any
    ) -> Iterator[httpx.Response]:
        try:
            with self._client.stream(method, path, **arguments) as response:
                if not response.is_success and response.status_code not in expect:
                    raise _error_of(response)
                yield response
        except httpx.TimeoutException as error:
            raise DeadlineExceeded(f"the gateway at {self._base_url} did not answer in time") from error
        except httpx.TransportError as error:
            raise Unavailable(f"the gateway at {self._base_url} can't be reached: {error}") from error


def _error_of(response: httpx.Response) -> FoundryError:
    content = response.read()
    try:
        error = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        # Not our gateway, or a proxy before it.
        text = content[:200].decode(errors="replace")
        kind = Unavailable if response.status_code in (502, 503, 504) else FoundryError
        return kind(f"{response.request.url} answered {response.status_code}: {text}")
    retry_after = response.headers.get("retry-after", "")
    return _error(error, float(retry_after) if retry_after.isdecimal() else None)


def _error(error: Json, retry_after_seconds: float | None) -> FoundryError:
    kind = BY_REASON.get(error.get("code") or "", FoundryError)
    return kind(error["message"], field=error.get("param"), retry_after_seconds=retry_after_seconds)


@dataclass(frozen=True, slots=True)
class _Event:
    data: str
    id: str


def _events(response: httpx.Response) -> Iterator[_Event]:
    """Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html), comments left out.

    Not `iter_lines`: it also splits at U+2028 and its like, which JSON may contain.
    """
    buffer = b""
    for content in response.iter_bytes():
        buffer += content
        *blocks, buffer = buffer.split(b"\n\n")
        for block in blocks:
            fields: dict[str, list[str]] = {}
            for line in block.decode().split("\n"):
                name, _, value = line.partition(":")
                fields.setdefault(name, []).append(value.removeprefix(" "))
            if "data" in fields:
                yield _Event("\n".join(fields["data"]), fields.get("id", [""])[-1])
