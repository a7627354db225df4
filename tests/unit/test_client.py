"""What the SDK sends, and what it makes of bytes that the gateway's own tests don't happen to send."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, get_type_hints
from urllib.parse import unquote

import httpx
import pytest

from foundry.client import (
    AsyncFoundry,
    CartridgeJson,
    DocumentJson,
    Foundry,
    GrantJson,
    HeaderJson,
    ModelJson,
    RunJson,
    VersionJson,
    make_sync,
    wire,
)
from foundry.errors import (
    Cancelled,
    CartridgeTooLong,
    DocumentUnreadable,
    FoundryError,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from foundry.identity import CartridgeHeader
from foundry.store import Manifest
from foundry.store.grants import Grant
from services.gateway.openai.models import ModelCard
from services.gateway.resources.documents import DocumentCard
from services.gateway.resources.runs import RunCard

DIGEST = "blake3:" + "0" * 64
VERSION = {"name": "x", "version": 3, "digest": DIGEST}
RUN = {"id": "run-1", "state": "succeeded", "error": None}


class Script:
    """Answers in the order given, and what was asked for each."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, bytes]] = []
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        self.url = ""

    def events(self, *events: tuple[str, dict[str, Any]]) -> None:
        self.answers.append((200, b"".join(sse(event, id=number) for number, event in events)))

    def chunks(self, *chunks: dict[str, Any]) -> None:
        self.answers.append((200, b"".join(map(sse, chunks)) + b"data: [DONE]\n\n"))


def sse(event: dict[str, Any], id: str = "") -> bytes:
    return (f"id: {id}\n" if id else "").encode() + b"data: " + json.dumps(event).encode() + b"\n\n"


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            content = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            script.asked.append((f"{self.command} {unquote(self.path)}", headers, content))
            status, body = script.answers.pop(0)
            self.send_response(status)
            if status != 204:
                self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, *unused: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    serving = Thread(target=server.serve_forever, args=(0.01,))
    serving.start()
    script.url = f"http://127.0.0.1:{server.server_port}"
    yield script
    server.shutdown()
    serving.join()
    server.server_close()


def chunk(delta: dict[str, Any], finish: str | None = None, **choice: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish, **choice}]}


END = {
    "choices": [],
    "foundry": {"model_fingerprint": "f", "template_digest": "t", "cartridges": [VERSION], "cartridge_tokens": 4},
    "usage": {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}},
}


# What is named

EVIL_NAMES = ["", "team/../victim", "victim2/versions/1", "..", "a/..", "a//b", "A", "a b", "a?x=1", "a#", "a%2fb", "é"]


@pytest.mark.parametrize("name", [*EVIL_NAMES, "x@1"])
@pytest.mark.parametrize(
    "call",
    [
        lambda client, name: client.cartridges.delete(name),
        lambda client, name: client.cartridges.delete(name, 1),
        lambda client, name: client.cartridges.versions(name),
        lambda client, name: client.cartridges.tag(name, "prod", 1),
        lambda client, name: client.cartridges.tag_history(name, "prod"),
        lambda client, name: client.cartridges.rollback_tag(name, "prod"),
        lambda client, name: client.cartridges.rollback(name, "1"),
        lambda client, name: client.cartridges.untag(name, "prod"),
        lambda client, name: client.cartridges.grant(name, "acme"),
        lambda client, name: client.cartridges.ungrant(name, "acme"),
        lambda client, name: client.cartridges.grants(name),
    ],
)
def test_a_name_that_is_none_is_never_sent(script: Script, call: Callable[[Foundry, str], Any], name: str) -> None:
    with Foundry(script.url) as client, pytest.raises(InvalidArgument) as caught:
        call(client, name)
    assert caught.value.field == "name"
    assert script.asked == []


@pytest.mark.parametrize(
    ("call", "values"),
    [
        (
            lambda client, text: client.cartridges.get(text),
            [*EVIL_NAMES, "x@", "x@blake3:00", "x@../y", "x@1/tags/a"],
        ),
        (lambda client, text: client.cartridges.tag("x", text, 1), ["", "..", "a/b", "prod/rollback", "A"]),
        (lambda client, text: client.cartridges.untag("x", text), ["", "..", "a/b"]),
        (lambda client, text: client.cartridges.delete("x", text), ["1/../..", 0, -1, True, 1.5]),
        (lambda client, text: client.cartridges.grant("x", text), ["", "..", "a/b"]),
        (lambda client, text: client.documents.get(text), ["", "..", "blake3:00", DIGEST + "/content", DIGEST.upper()]),
        (lambda client, text: client.documents.text(text), ["", "x"]),
        (lambda client, text: client.documents.delete(text), ["", "x"]),
        (lambda client, text: client.runs.get(text), ["", "..", "a/b", "run-1?", "\udcff"]),
        (lambda client, text: client.runs.cancel(text), ["", "run-1/events"]),
        (lambda client, text: client.runs.pause(text), [""]),
        (lambda client, text: client.runs.resume(text), [""]),
        (lambda client, text: client.runs.delete(text), ["", ".."]),
        (lambda client, text: list(client.runs.events(text)), ["", ".."]),
        (lambda client, text: list(client.runs.events("run-1", after=text)), ["x", "1\r\nx: y", "1" * 21]),
    ],
)
def test_whatever_goes_into_a_path_or_header_is_checked(
    script: Script, call: Callable[[Foundry, Any], Any], values: list[Any]
) -> None:
    with Foundry(script.url) as client:
        for value in values:
            with pytest.raises(InvalidArgument):
                call(client, value)
    assert script.asked == []


def test_a_name_that_ends_in_a_word_of_the_api_means_the_cartridge(script: Script) -> None:
    script.answers = [(200, b"{}")] * 2
    with Foundry(script.url) as client:
        client.cartridges.get("team/versions")
        client.cartridges.get(f"x@{DIGEST}")
    asked = [line for line, *_ in script.asked]
    assert asked == ["GET /v1/cartridges/team/versions@latest", f"GET /v1/cartridges/x@{DIGEST}"]


# What is sent


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda client: client.documents.create("\ud800"), "text"),
        (lambda client: client.documents.create("text", title="\ud800"), "title"),
        (lambda client: client.runs.create(text="\ud800", name="x"), "text"),
        (lambda client: client.runs.create(learning_rate=float("nan")), "learning_rate"),
        (lambda client: client.runs.create(document=object()), "document"),
        (lambda client: client.chat("x", "\ud800"), "messages"),
        (lambda client: client.chat("x", "?", temperature=float("inf")), "temperature"),
        (lambda client: client.chat("x", "?", n=2), "n"),
        (lambda client: client.chat("x", "?", stream=False), "stream"),
        (lambda client: client.chat("x", "?", stream_options={}), "stream_options"),
        (lambda client: client.cartridges.rollback("x", "\ud800"), "to"),
    ],
)
def test_what_cannot_be_sent_is_named(script: Script, call: Callable[[Foundry], Any], field: str) -> None:
    with Foundry(script.url) as client, pytest.raises(InvalidArgument) as caught:
        call(client)
    assert caught.value.field == field
    assert script.asked == []


@pytest.mark.parametrize("key", ["fdy_secret\n", "fdy secret", "fdy_sécret"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOUNDRY_API_KEY", key)
    for make in (Foundry, AsyncFoundry, lambda: Foundry(api_key=key)):
        with pytest.raises(InvalidArgument) as caught:
            make()
        assert "cret" not in caught.value.message


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/", "//"])
def test_the_address_may_be_openais(script: Script, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script.answers = [(200, b'{"data": []}')] * 2
    monkeypatch.setenv("FOUNDRY_GATEWAY", script.url + ending)
    for client in (Foundry(script.url + ending), Foundry()):
        assert client.runs.list() == []
        client.close()
    assert [line for line, *_ in script.asked] == ["GET /v1/runs?limit=1000"] * 2


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host?x=1", "", "http://[::1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Foundry(url)
    assert caught.value.field == "base_url"


def test_a_list_is_asked_for_page_by_page_until_there_is_enough(script: Script) -> None:
    page = {"data": [{}] * 1000, "has_more": True, "last_id": "z"}
    script.answers = [(200, json.dumps(each).encode()) for each in (page, page | {"data": [{}] * 7})]
    with Foundry(script.url) as client:
        assert len(client.runs.list(limit=1007)) == 1007
    assert [line for line, *_ in script.asked] == ["GET /v1/runs?limit=1000", "GET /v1/runs?limit=7&after=z"]


# What comes back


def test_an_answer_has_all_that_was_asked_for(script: Script) -> None:
    empty: dict[str, Any] = {"logprob": -1.0, "bytes": None, "top_logprobs": []}
    logprobs = [{"token": word, **empty} for word in ("Hel", "lo")]
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":'}}
    script.chunks(
        chunk({"role": "assistant", "content": "Hel"}, logprobs={"content": logprobs[:1]}, token_ids=[1]),
        chunk({"content": "lo"}, logprobs={"content": logprobs[1:]}, token_ids=[2]),
        chunk({"content": None, "tool_calls": [call]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": " 1}"}}]}),
        chunk({}, "tool_calls"),
        END,
    )
    with Foundry(script.url) as client:
        answer = client.chat("x", "Hi", n=1, logprobs=True, return_token_ids=True)
    assert (answer.text, answer.finish_reason, answer.token_ids) == ("Hello", "tool_calls", (1, 2))
    assert answer.logprobs == tuple(logprobs)
    function = {"name": "add", "arguments": '{"a": 1}'}
    assert answer.tool_calls == ({"type": "function", "function": function, "id": "c1"},)
    assert str(answer.cartridges[0]) == "x@3"


@pytest.mark.parametrize("chunks", [[], [chunk({"content": "Hel"})]])
def test_an_answer_that_breaks_off_is_none(script: Script, chunks: list[dict[str, Any]]) -> None:
    script.answers.append((200, b"".join(map(sse, chunks))))
    with Foundry(script.url) as client, pytest.raises(Unavailable):
        client.chat("x", "Hi")


def test_events_go_on_where_they_broke_and_end_with_204(script: Script) -> None:
    script.events(("1-0", {"type": "state"}), ("2-0", {"type": "step"}))
    script.answers.append((204, b""))
    with Foundry(script.url) as client:
        assert [event["id"] for event in client.runs.events("run-1")] == ["1-0", "2-0"]
    assert [headers.get("last-event-id") for _, headers, _ in script.asked] == [
        None,
        "2-0",
    ]


def test_events_so_far_are_not_waited_for(script: Script) -> None:
    script.events(("1-0", {"type": "state"}))
    with Foundry(script.url) as client:
        assert [event["type"] for event in client.runs.events("run-1", follow=False)] == ["state"]
    assert [line for line, *_ in script.asked] == ["GET /v1/runs/run-1/events?follow=false"]


@pytest.mark.parametrize(
    ("state", "error", "kind"),
    [
        ("succeeded", None, None),
        ("cancelled", None, Cancelled),
        ("failed", "CARTRIDGE_TOO_LONG: too long", CartridgeTooLong),
        ("failed", "no reason that is known", FoundryError),
    ],
)
def test_training_ends_as_the_run_did(
    script: Script, state: str, error: str | None, kind: type[FoundryError] | None, tmp_path: Any
) -> None:
    file = tmp_path / "handbook.md"
    file.write_text("The harbour is open.")
    script.answers.append((201, json.dumps(RUN | {"state": "queued"}).encode()))
    script.events(("1-0", {"type": "finished", "state": state}))
    script.answers.append((200, json.dumps(RUN | {"state": state, "error": error}).encode()))
    with Foundry(script.url) as client:
        training = client.train(file, "handbook", recipe="quick")
        if kind is None:
            assert training.wait()["state"] == "succeeded"
        else:
            with pytest.raises(FoundryError) as caught:
                training.wait()
            assert type(caught.value) is kind
            assert "run-1" in caught.value.message
    sent = json.loads(script.asked[0][2])
    assert sent == {"text": "The harbour is open.", "name": "handbook", "title": "handbook.md", "recipe": "quick"}


def test_a_document_that_is_no_text_is_refused(script: Script, tmp_path: Any) -> None:
    with Foundry(script.url) as client:
        for document in (b"\xff", tmp_path / "absent.md"):
            with pytest.raises(DocumentUnreadable):
                client.train(document, "x")
    assert script.asked == []


async def test_the_client_for_asyncio_does_the_same(script: Script) -> None:
    script.chunks(chunk({"content": "Hel"}), chunk({"content": "lo"}, "stop"), END)
    script.answers.append((201, json.dumps(RUN | {"state": "queued"}).encode()))
    script.events(("1-0", {"type": "state"}), ("2-0", {"type": "finished"}))
    script.answers.append((200, json.dumps(RUN).encode()))
    script.answers.append((404, b'{"error": {"message": "gone", "code": "RUN_NOT_FOUND", "param": "run_id"}}'))
    async with AsyncFoundry(script.url) as client:
        stream = client.stream_chat("x", "Hi")
        assert [text async for text in stream] == ["Hel", "lo"]
        assert stream.answer is not None
        training = await client.train("The harbour is open.", "x")
        assert (await training.wait())["state"] == "succeeded"
        with pytest.raises(FoundryError) as caught:
            await client.runs.get("run-1")
        assert (caught.value.reason, caught.value.field) == ("RUN_NOT_FOUND", "run_id")
        with pytest.raises(InvalidArgument):
            await client.cartridges.delete("team/../victim")


def test_the_client_that_waits_is_made_from_the_other() -> None:
    assert make_sync.TARGET.read_text() == make_sync.synchronous(make_sync.SOURCE.read_text())


@pytest.mark.parametrize(
    ("answered", "model"),
    [
        (ModelJson, ModelCard),
        (DocumentJson, DocumentCard),
        (RunJson, RunCard),
        (VersionJson, Manifest),
        (GrantJson, Grant),
    ],
)
def test_the_types_say_what_the_gateway_answers(answered: Any, model: Any) -> None:
    fields = {field.serialization_alias or name for name, field in model.model_fields.items()}
    assert get_type_hints(answered).keys() - {"object", "durable"} == fields - {"object"}


def test_the_header_has_its_fields() -> None:
    assert get_type_hints(HeaderJson).keys() == inspect.signature(CartridgeHeader).parameters.keys()
    assert "version" in get_type_hints(CartridgeJson)


# Bytes


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_cut_at_blank_lines_only(size: int) -> None:
    # Raw U+2028, U+0085 and a form feed: line ends for str.splitlines, not for the standard.
    words = ["one\u2028two", "é\u0085\u000c東京", ""]
    content = "".join(f": ping\n\nid: {index}\ndata: {word}\n\n" for index, word in enumerate(words)).encode()
    parser = wire.EventParser()
    pieces = [content[begin : begin + size] for begin in range(0, len(content), size)]
    events = [event for piece in pieces for event in parser.feed(piece)]
    assert [(event.id, event.data) for event in events] == [(str(index), word) for index, word in enumerate(words)]


def test_an_event_that_was_cut_off_is_none() -> None:
    assert [event.data for event in wire.EventParser().feed(b"data: whole\n\ndata: par")] == ["whole"]


def response(status: int, **headers: str) -> httpx.Response:
    return httpx.Response(status, headers=headers, request=httpx.Request("GET", "http://gateway/v1/models"))


def test_errors_come_back_as_their_types() -> None:
    body = json.dumps({"error": {"message": "full", "type": "x", "param": "n", "code": "RESOURCE_EXHAUSTED"}}).encode()
    error = wire.error_of(response(429, **{"retry-after": "3"}), body)
    assert type(error) is ResourceExhausted
    assert (error.message, error.field, error.retry_after_seconds) == ("full", "n", 3.0)


@pytest.mark.parametrize(
    ("status", "content", "kind"),
    [
        (502, b"<html>Bad Gateway", Unavailable),
        (307, b"", FoundryError),
        (404, b'{"detail": "Not Found"}', FoundryError),
        (500, b'["error"]', FoundryError),
        (500, b'{"error": "text"}', FoundryError),
        (418, b'{"error": {"message": "tea", "code": "TEAPOT"}}', FoundryError),
    ],
)
def test_answers_that_are_not_the_gateways_are_errors_too(
    status: int, content: bytes, kind: type[FoundryError]
) -> None:
    assert type(wire.error_of(response(status), content)) is kind
