"""Documents: kept under their digest, refused if they are no text or too long."""

from __future__ import annotations

import pytest

from foundry.errors import DocumentNotFound, DocumentTooLong, DocumentUnreadable, InvalidArgument
from foundry.identity import content_digest
from tests.contract.gateway_routes.site import DOCUMENT, Site, specification


def test_a_document_is_kept_under_its_digest(site: Site) -> None:
    # Another test's document would have its title, or none.
    text = f"{DOCUMENT} Titled."
    card = site.client.documents.create(text, title="The treaty")
    assert card["digest"] == content_digest(text.encode())
    assert (card["title"], card["num_bytes"]) == ("The treaty", len(text))
    assert site.client.documents.get(card["digest"]) == card
    assert card in site.client.documents.list()
    assert site.client.documents.text(card["digest"]) == text
    answer = site.http("POST", "/v1/documents", json={"text": text, "title": "Another title"})
    assert (answer.status_code, answer.json()) == (201, card)


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe", b"a\0b"])
def test_what_is_no_text_is_refused(site: Site, content: bytes) -> None:
    with pytest.raises(DocumentUnreadable) as raised:
        site.client.documents.create(content)
    assert raised.value.field == "text"


def test_a_document_larger_than_the_store_takes_is_refused(site: Site) -> None:
    with pytest.raises(DocumentTooLong):
        site.client.documents.create("a" * 100_001)
    answer = site.http("POST", "/v1/documents", json={"text": "a" * 100_001})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "DOCUMENT_TOO_LONG"
    assert site.client.documents.create("a" * 100_000)["num_bytes"] == 100_000


def test_a_body_beyond_the_limit_is_never_held(site: Site) -> None:
    before = site.gateway.peak_bytes()
    num_bytes = 256 * 2**20
    for content in ((b"a" * 2**20 for _ in range(num_bytes // 2**20)), b"a" * 2**22):
        answer = site.http("POST", "/v1/documents", content=content, headers={"content-type": "text/plain"})
        assert answer.status_code == 413
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert site.gateway.peak_bytes() - before < num_bytes / 8
    big = {"model": "tiny", "messages": [{"role": "user", "content": "a" * 2**22}]}
    assert site.http("POST", "/v1/chat/completions", json=big).status_code == 413


def test_a_deleted_document_is_gone(site: Site) -> None:
    digest = site.client.documents.create("A text that nobody needs.")["digest"]
    assert site.http("DELETE", f"/v1/documents/{digest}").status_code == 204
    # A client that did not hear of it asks again.
    assert site.http("DELETE", f"/v1/documents/{digest}").status_code == 204
    for gone in (site.client.documents.get, site.client.documents.text):
        with pytest.raises(DocumentNotFound):
            gone(digest)
    assert digest not in [card["digest"] for card in site.client.documents.list()]


def test_a_document_that_a_run_needs_stays(site: Site) -> None:
    prompts = site.client.documents.create('{"prompt": "What was signed?"}')["digest"]
    run = site.client.runs.create(
        **specification(text="Of a run. " * 20, prompts={"kind": "document", "digest": prompts})
    )
    site.client.runs.pause(run["id"])
    for digest in (run["spec"]["document"], prompts):
        refused = site.http("DELETE", f"/v1/documents/{digest}")
        assert (refused.status_code, refused.json()["error"]["param"]) == (409, "digest")
        assert run["id"] in refused.json()["error"]["message"]
        assert site.client.documents.get(digest)["digest"] == digest
    site.client.runs.cancel(run["id"])
    for digest in (run["spec"]["document"], prompts):
        site.client.documents.delete(digest)


def test_unknown_documents_are_not_found(site: Site) -> None:
    missing = site.http("GET", "/v1/documents/blake3:" + "0" * 64)
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "digest")
    assert site.http("DELETE", "/v1/documents/nonsense").status_code == 400
    with pytest.raises(DocumentNotFound):
        site.client.documents.get("blake3:" + "0" * 64)
    with pytest.raises(InvalidArgument):
        site.client.documents.get("nonsense")
