"""What the SDK makes of bytes that the gateway's own tests don't happen to send."""

from __future__ import annotations

import json

import httpx
import pytest

from foundry.client import FoundryClient, _error_of, _events
from foundry.errors import FoundryError, InvalidArgument, ResourceExhausted, Unavailable


class Cut(httpx.SyncByteStream):
    """Bytes in pieces of a given size, as a network delivers them."""

    def __init__(self, content: bytes, size: int) -> None:
        self._pieces = [content[begin : begin + size] for begin in range(0, len(content), size)]

    def __iter__(self):  # type: ignore[no-untyped-def]
        yield from self._pieces


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_cut_at_blank_lines_only(size: int) -> None:
    # Raw U+2028, U+0085 and a form feed: line ends for str.splitlines, not for the standard.
    words = ["one\u2028two", "é\u0085\u000c東京", ""]
    content = "".join(f": ping\n\nid: {index}\ndata: {word}\n\n" for index, word in enumerate(words)).encode()
    events = list(_events(httpx.Response(200, stream=Cut(content, size))))
    assert [(event.id, event.data) for event in events] == [(str(index), word) for index, word in enumerate(words)]


def test_an_event_that_was_cut_off_is_none() -> None:
    events = _events(httpx.Response(200, stream=Cut(b"data: whole\n\ndata: par", 5)))
    assert [event.data for event in events] == ["whole"]


def response(status: int, content: bytes, **headers: str) -> httpx.Response:
    request = httpx.Request("GET", "http://gateway/v1/models")
    return httpx.Response(status, content=content, headers=headers, request=request)


def test_errors_come_back_as_their_types() -> None:
    body = json.dumps({"error": {"message": "full", "type": "x", "param": "n", "code": "RESOURCE_EXHAUSTED"}}).encode()
    error = _error_of(response(429, body, **{"retry-after": "3"}))
    assert type(error) is ResourceExhausted
    assert (error.message, error.field, error.retry_after_seconds) == ("full", "n", 3.0)


@pytest.mark.parametrize(
    ("status", "content", "kind"),
    [
        (502, b"<html>Bad Gateway", Unavailable),
        (404, b'{"detail": "Not Found"}', FoundryError),
        (500, b'["error"]', FoundryError),
        (418, b'{"error": {"message": "tea", "code": "TEAPOT"}}', FoundryError),
    ],
)
def test_answers_that_are_not_the_gateways_are_errors_too(
    status: int, content: bytes, kind: type[FoundryError]
) -> None:
    assert type(_error_of(response(status, content))) is kind


@pytest.mark.parametrize("key", ["fdy_secret\n", "fdy secret", "fdy_sécret"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOUNDRY_API_KEY", key)
    for make in (FoundryClient, lambda: FoundryClient(api_key=key)):
        with pytest.raises(InvalidArgument) as caught:
            make()
        assert "cret" not in caught.value.message
