"""What HTTP itself asks of every route: methods, HEAD, media types."""

from __future__ import annotations

import pytest

from tests.contract.gateway_routes.site import DOCUMENT, Site, specification


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PATCH", "/v1/documents", {"GET", "HEAD", "POST"}),
        ("DELETE", "/v1/chat/completions", {"POST"}),
        ("POST", "/v1/documents/blake3:0/content", {"GET", "HEAD"}),
        ("PATCH", "/v1/cartridges/handbook/tags/best", {"GET", "HEAD", "PUT", "DELETE"}),
        ("POST", "/healthz", {"GET", "HEAD"}),
        ("TRACE", "/v1/runs", {"GET", "HEAD", "POST"}),
    ],
)
def test_another_method_is_told_which_there_are(site: Site, method: str, path: str, allowed: set[str]) -> None:
    answer = site.http(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "INVALID_ARGUMENT")
    assert set(answer.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/models", "/v1/runs", "/v1/runs/run-aaaaaaaa", "/nothing"])
def test_head_answers_as_get_without_content(site: Site, path: str) -> None:
    head, get = site.http("HEAD", path), site.http("GET", path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    for name in ("content-type", "content-length"):
        assert head.headers[name] == get.headers[name]


def test_head_of_a_stream_ends_at_once(site: Site) -> None:
    run_id = site.client.runs.create(**specification(text=DOCUMENT))["id"]
    head = site.http("HEAD", f"/v1/runs/{run_id}/events")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"].startswith("text/event-stream")
    site.client.runs.cancel(run_id)


@pytest.mark.parametrize("media_type", ["Application/JSON", "application/json;charset=UTF-8", "APPLICATION/json ; a=b"])
def test_json_is_taken_however_its_media_type_is_written(site: Site, media_type: str) -> None:
    headers = {"content-type": media_type}
    put = site.http("POST", "/v1/documents", content=b'{"text": "Some text."}', headers=headers)
    assert (put.status_code, put.json()["num_bytes"]) == (201, 10)
    body = b'{"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "Hello."}]}'
    assert site.http("POST", "/v1/chat/completions", content=body, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "media_type", ["text/plain; charset=utf-8", "Text/Plain", "text/markdown", "TEXT/MARKDOWN;a=b"]
)
def test_a_text_is_taken_however_its_media_type_is_written(site: Site, media_type: str) -> None:
    answer = site.http("POST", "/v1/documents", content="# Ünder".encode(), headers={"content-type": media_type})
    assert (answer.status_code, answer.json()["num_bytes"]) == (201, 8)


@pytest.mark.parametrize("media_type", ["text/plain; charset=latin-1", "text/plainer", "image/png", "nonsense", ""])
def test_other_media_types_are_refused(site: Site, media_type: str) -> None:
    headers = {"content-type": media_type} if media_type else {}
    answer = site.http("POST", "/v1/documents", content=b"Some text.", headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (415, "content-type")
