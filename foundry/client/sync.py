"""The client that waits. Made from aio.py by `make docs`: change that one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import Any, Self, cast

import httpx

from foundry.client import paths, wire
from foundry.client.answer import AnswerParts, ChatAnswer, chat_body
from foundry.client.types import (
    CartridgeJson,
    DatasetJson,
    DatasetRowJson,
    DocumentJson,
    EventJson,
    GrantJson,
    ModelJson,
    RunJson,
    TagJson,
    VersionJson,
)
from foundry.client.wire import Json
from foundry.errors import Cancelled, DeadlineExceeded, Unavailable
from foundry.identity import CartridgeBytes


class Foundry:
    """`with Foundry(url) as client: client.chat("handbook@latest", "What ...?").text`"""

    def __init__(
        self, base_url: str | None = None, *, api_key: str | None = None, timeout_seconds: float = 600.0
    ) -> None:
        """`base_url` is the gateway's address, FOUNDRY_GATEWAY's where that is set, else http://127.0.0.1:8000;
        `api_key` what it is shown, FOUNDRY_API_KEY's where that is set; `timeout_seconds` the longest silence that is
        waited out. Raises InvalidArgument for what is no address, and for a key that can't be sent.

        Calls raise the types of `foundry.errors` that the services raised, Unauthenticated where the gateway does not
        take the key, PermissionDenied where it lacks the scope, and InvalidArgument for names that are none.
        """
        self._http = Http(base_url, api_key, timeout_seconds)
        self.documents = Documents(self._http)
        self.cartridges = Cartridges(self._http)
        self.runs = Runs(self._http)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def models(self, *, limit: int | None = None) -> list[ModelJson]:
        """The base model first, then every cartridge; or the first `limit` of them."""
        return cast("list[ModelJson]", self._http.listing("/v1/models", limit))

    def ready(self) -> Json:
        """{status, reasons} of the gateway, ready or not. Raises Unavailable if there is none."""
        return self._http.json("GET", "/readyz", expect=(200, 503))

    def chat(self, model: str, messages: str | Sequence[Mapping[str, Any]], **options: Any) -> ChatAnswer:
        """The whole answer. `messages` may be the user's words alone; options as in `stream_chat`."""
        stream = self.stream_chat(model, messages, **options)
        for _ in stream:
            pass
        assert stream.answer is not None
        return stream.answer

    def stream_chat(self, model: str, messages: str | Sequence[Mapping[str, Any]], **options: Any) -> ChatStream:
        """The answer as it comes. `options` are the API's: max_tokens, temperature, seed, stop, cartridges ..."""
        return ChatStream(self._http, chat_body(model, messages, options))

    def train(self, document: str | bytes | Path, name: str, **spec: Any) -> Training:
        """Queue a run that makes a cartridge of a document: `Foundry().train(Path("handbook.md"), "handbook").wait()`

        A path stands for the file's text, anything else is the text itself. `spec` has the keys of a run
        (`docs/runs.md`); what is not given is chosen by the recipe. Raises DocumentUnreadable, and what the gateway
        finds wrong.
        """
        return Training(self.runs, self.runs.create(**wire.spec_of(document, name, spec)))


class Training:
    """A run that was queued; `queued` is what the gateway answered, with what was `chosen` and why."""

    def __init__(self, runs: Runs, queued: RunJson) -> None:
        self._runs, self.queued, self.id = runs, queued, queued["id"]

    def wait(self) -> RunJson:
        """The run, once it has succeeded. Raises what it failed with, as the type that its worker raised; Cancelled."""
        run = self._runs.wait(self.id)
        if run["state"] == "failed":
            raise wire.run_error(run)
        if run["state"] == "cancelled":
            raise Cancelled(f"{self.id} was cancelled")
        return run

    def events(self) -> Iterator[EventJson]:
        return self._runs.events(self.id)

    def cancel(self) -> RunJson:
        return self._runs.cancel(self.id)


class ChatStream:
    """Iterate over the text as it comes; then `answer` is set. Leaving the iteration early cancels the generation."""

    def __init__(self, http: Http, body: Json) -> None:
        self._http, self._body = http, body
        self.answer: ChatAnswer | None = None

    def __iter__(self) -> Iterator[str]:
        parts, parser = AnswerParts(self._body["model"]), wire.EventParser()
        with self._http.stream("POST", "/v1/chat/completions", json=self._body) as response:
            for content in response.iter_bytes():
                for event in parser.feed(content):
                    if event.data == "[DONE]":
                        self.answer = parts.whole()
                        return
                    if text := parts.add(event.data):
                        yield text
        raise Unavailable("the gateway ended the answer before it was complete")


class Documents:
    def __init__(self, http: Http) -> None:
        self._http = http

    def create(self, text: str | bytes, *, title: str = "") -> DocumentJson:
        """Raises DocumentUnreadable, DocumentTooLong."""
        content, headers = wire.utf8(text, "text"), {"content-type": "text/plain; charset=utf-8"}
        wire.utf8(title, "title")
        created = self._http.json("POST", "/v1/documents", params={"title": title}, content=content, headers=headers)
        return cast("DocumentJson", created)

    def get(self, digest: str) -> DocumentJson:
        return cast("DocumentJson", self._http.json("GET", paths.document(digest)))

    def text(self, digest: str) -> str:
        with self._http.stream("GET", f"{paths.document(digest)}/content") as response:
            return (response.read()).decode()

    def delete(self, digest: str) -> None:
        """Cartridges that were trained on it stay."""
        self._http.json("DELETE", paths.document(digest))

    def list(self, *, limit: int | None = None) -> list[DocumentJson]:
        """Oldest first; all, or the first `limit`."""
        return cast("list[DocumentJson]", self._http.listing("/v1/documents", limit))


class Cartridges:
    def __init__(self, http: Http) -> None:
        self._http = http

    def get(self, reference: str) -> CartridgeJson:
        """What a reference means now, where it comes from and where its bytes are."""
        return cast("CartridgeJson", self._http.json("GET", paths.reference(reference)))

    def versions(self, name: str, *, limit: int | None = None) -> list[VersionJson]:
        """Manifests, oldest first; all, or the first `limit`."""
        return cast("list[VersionJson]", self._http.listing(f"{paths.cartridge(name)}/versions", limit))

    def tag(self, name: str, tag: str, version: int) -> TagJson:
        """`previous` is what the tag meant before, or None."""
        moved = self._http.json("PUT", paths.tag(name, tag), json={"version": version})
        return cast("TagJson", moved)

    def tag_history(self, name: str, tag: str) -> TagJson:
        """What the tag means, and in `history`, newest first, what it meant before."""
        return cast("TagJson", self._http.json("GET", paths.tag(name, tag)))

    def rollback_tag(self, name: str, tag: str) -> TagJson:
        """Let the tag mean what it meant before. Raises Conflict if there is no such version."""
        return cast("TagJson", self._http.json("POST", f"{paths.tag(name, tag)}/rollback"))

    def rollback(self, name: str, to: str) -> VersionJson:
        """Publish an older version's bytes (its number, a tag or a digest) as a new version; its manifest.

        Raises Conflict while a run holds the name.
        """
        published = self._http.json("POST", f"{paths.cartridge(name)}/rollback", json={"to": to})
        return cast("VersionJson", published)

    def untag(self, name: str, tag: str) -> None:
        self._http.json("DELETE", paths.tag(name, tag))

    def delete(self, name: str, version: int | None = None) -> None:
        """One version, or the name with all of them."""
        path = paths.cartridge(name) if version is None else paths.version(name, version)
        self._http.json("DELETE", path)

    def grant(self, name: str, tenant: str) -> GrantJson:
        """Let another tenant query the cartridge, and nothing else."""
        return cast("GrantJson", self._http.json("PUT", paths.grant(name, tenant)))

    def ungrant(self, name: str, tenant: str) -> None:
        """Raises GrantNotFound."""
        self._http.json("DELETE", paths.grant(name, tenant))

    def grants(self, name: str, *, limit: int | None = None) -> list[GrantJson]:
        """By tenant; all, or the first `limit`."""
        return cast("list[GrantJson]", self._http.listing(f"{paths.cartridge(name)}/grants", limit))

    def download(self, name: str, version: int) -> bytes:
        """A version as a safetensors file. Raises DigestMismatch if it was damaged on the way."""
        with self._http.stream("GET", f"{paths.version(name, version)}/file") as response:
            content = response.read()
            CartridgeBytes.from_file(content).verify(response.headers["x-foundry-digest"])
        return content

    def upload(self, name: str, content: bytes, *, origin: str = "a file", document: str | None = None) -> VersionJson:
        """Make a safetensors file, as `download` returns it, the newest version of a name; its manifest.

        `origin` says where it comes from, `document` is the digest of what it stands in for. Raises
        CartridgeUnreadable, FingerprintMismatch if it is for another model, Conflict while a run holds the name.
        """
        headers = {
            "content-type": "application/vnd.safetensors",
            "x-foundry-digest": CartridgeBytes.from_file(content).digest(),
        }
        params = {"origin": origin} | ({"document": document} if document else {})
        path = f"{paths.cartridge(name)}/versions"
        return cast("VersionJson", self._http.json("POST", path, content=content, headers=headers, params=params))

    # Last, because after it `list` means this method.
    def list(self, *, limit: int | None = None) -> list[CartridgeJson]:
        """By name; all, or the first `limit`."""
        return cast("list[CartridgeJson]", self._http.listing("/v1/cartridges", limit))


class Runs:
    def __init__(self, http: Http) -> None:
        self._http = http

    def create(self, **spec: Any) -> RunJson:
        """Queue a run: the keys of a run specification, with `document` (a digest) or `text`."""
        return cast("RunJson", self._http.json("POST", "/v1/runs", json=spec))

    def get(self, run_id: str) -> RunJson:
        return cast("RunJson", self._http.json("GET", paths.run(run_id)))

    def cancel(self, run_id: str) -> RunJson:
        return cast("RunJson", self._http.json("POST", f"{paths.run(run_id)}/cancel"))

    def pause(self, run_id: str) -> RunJson:
        """After the step in hand."""
        return cast("RunJson", self._http.json("POST", f"{paths.run(run_id)}/pause"))

    def resume(self, run_id: str) -> RunJson:
        return cast("RunJson", self._http.json("POST", f"{paths.run(run_id)}/resume"))

    def delete(self, run_id: str) -> None:
        """The versions that it published stay. Raises Conflict unless it is over."""
        self._http.json("DELETE", paths.run(run_id))

    def events(self, run_id: str, *, after: str | None = None, follow: bool = True) -> Iterator[EventJson]:
        """What happened and, with `follow`, happens until the run has ended; `after` is the `id` of the last event
        already seen.

        A connection that breaks is made again where it broke. Raises Unavailable if that keeps failing.
        """
        path, reconnects = f"{paths.run(run_id)}/events{'' if follow else '?follow=false'}", 0
        while True:
            headers = {"last-event-id": paths.event_id(after)} if after else {}
            parser = wire.EventParser()
            try:
                with self._http.stream("GET", path, headers=headers, timeout=wire.EVENTS_SILENCE_SECONDS) as response:
                    if response.status_code == httpx.codes.NO_CONTENT:
                        # Nothing comes after that event: it was the last.
                        return
                    for content in response.iter_bytes():
                        for item in parser.feed(content):
                            after, reconnects = item.id, 0
                            event = cast("EventJson", {"id": item.id, **json.loads(item.data)})
                            yield event
                            if event.get("type") == "finished":
                                return
                if not follow:
                    return
                raise Unavailable(f"the event stream of {run_id} ended before the run")
            except (Unavailable, DeadlineExceeded):
                reconnects += 1
                if reconnects > wire.EVENTS_RECONNECTS:
                    raise
                sleep(min(0.1 * 2**reconnects, 2.0))

    def dataset(self, run_id: str) -> DatasetJson:
        """What the run trains on. Raises NotFound until it is written, and once it is not kept any more."""
        return cast("DatasetJson", self._http.json("GET", f"{paths.run(run_id)}/dataset"))

    def dataset_rows(self, run_id: str) -> Iterator[DatasetRowJson]:
        """Its conversations, as they are read, in the order that its digest has them. Raises FingerprintMismatch where
        another model is served: the text of answers is that model's to write."""
        asked: Json = {}
        while True:
            page = self._http.json("GET", f"{paths.run(run_id)}/dataset/rows", params=asked)
            for row in page["data"]:
                yield cast("DatasetRowJson", row)
            if not page["has_more"]:
                return
            asked = {"after": page["last_id"]}

    def wait(self, run_id: str) -> RunJson:
        """The run, once it has ended, however that was."""
        for _ in self.events(run_id):
            pass
        return self.get(run_id)

    def list(self, *, limit: int | None = None) -> list[RunJson]:
        """Newest first; all, or the first `limit`."""
        return cast("list[RunJson]", self._http.listing("/v1/runs", limit))


class Http:
    """httpx with our errors."""

    def __init__(self, base_url: str | None, api_key: str | None, timeout_seconds: float) -> None:
        self._client = httpx.Client(**wire.options(base_url, api_key, timeout_seconds))

    def close(self) -> None:
        self._client.close()

    def json(self, method: str, path: str, *, expect: Sequence[int] = (), **arguments: Any) -> Json:
        with self.stream(method, path, expect=expect, **arguments) as response:
            content = response.read()
        answer: Json = json.loads(content) if content else {}
        return answer

    def listing(self, path: str, limit: int | None) -> list[Any]:
        """Entries, page after page: all, or the first `limit`."""
        data: list[Any] = []
        asked: Json = {}
        while limit is None or len(data) < limit:
            asked["limit"] = wire.PAGE if limit is None else min(wire.PAGE, limit - len(data))
            page = self.json("GET", path, params=asked)
            data += page["data"]
            if not page.get("has_more"):
                break
            asked["after"] = page["last_id"]
        # What is asked for with the first page comes beside its entries: the base model.
        return data[:limit]

    @contextmanager
    def stream(
        self, method: str, path: str, *, expect: Sequence[int] = (), json: Json | None = None, **arguments: Any
    ) -> Iterator[httpx.Response]:
        if json is not None:
            arguments |= {"content": wire.body(json), "headers": {"content-type": "application/json"}}
        try:
            with self._client.stream(method, path, **arguments) as response:
                if not response.is_success and response.status_code not in expect:
                    raise wire.error_of(response, response.read())
                yield response
        except httpx.TimeoutException as error:
            raise DeadlineExceeded(f"the gateway at {self._client.base_url} did not answer in time") from error
        except httpx.TransportError as error:
            raise Unavailable(f"the gateway at {self._client.base_url} can't be reached: {error}") from error
