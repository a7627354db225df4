"""Documents: named by content, refused when they are no text."""

from __future__ import annotations

from pathlib import Path

import pytest

from foundry.errors import (
    DigestMismatch,
    DocumentNotFound,
    DocumentTooLong,
    DocumentUnreadable,
    InvalidArgument,
    StoreUnavailable,
)
from foundry.identity import content_digest
from foundry.store import DatasetStore, DocumentStore, Objects

LIMIT = 100


@pytest.fixture
def documents(tmp_path: Path) -> DocumentStore:
    return DocumentStore(Objects.open(f"file://{tmp_path}", retry_seconds=1), max_document_bytes=LIMIT)


@pytest.mark.parametrize("text", ["plain", "Zürich, 東京 🗼", "\ufeffwith a byte order mark", "x" * LIMIT])
async def test_a_document_comes_back_by_its_digest(documents: DocumentStore, text: str) -> None:
    digest = await documents.put(text, title="a title")
    assert digest == content_digest(text.encode())
    assert await documents.put(text.encode()) == digest
    assert await documents.get(digest) == text
    info = await documents.info(digest)
    assert (info.digest, info.title, info.num_bytes) == (digest, "a title", len(text.encode()))
    assert await documents.list() == [info]


@pytest.mark.parametrize("content", ["", b"", " \n\t", b"\xff\xfe", b"abc\x00def", "a\udc80b", "text".encode("utf-16")])
async def test_what_is_no_text_is_unreadable(documents: DocumentStore, content: str | bytes) -> None:
    with pytest.raises(DocumentUnreadable) as caught:
        await documents.put(content)
    assert caught.value.field == "document"
    assert await documents.list() == []


async def test_a_document_beyond_the_limit_is_refused(documents: DocumentStore) -> None:
    with pytest.raises(DocumentTooLong):
        await documents.put("é" * (LIMIT // 2) + "x")


async def test_a_deleted_document_is_not_found(documents: DocumentStore) -> None:
    digest = await documents.put("text")
    await documents.delete(digest)
    assert await documents.list() == []
    for refused in (documents.get, documents.info, documents.delete):
        with pytest.raises(DocumentNotFound):
            await refused(digest)


async def test_a_deletion_that_was_cut_off_can_be_repeated(
    documents: DocumentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, delete = await documents.put("text"), documents._objects.delete
    for left in (".json", ".txt"):

        async def cut_off(key: str, left: str = left) -> None:
            if key.endswith(left):
                raise StoreUnavailable("away")
            await delete(key)

        monkeypatch.setattr(documents._objects, "delete", cut_off)
        with pytest.raises(StoreUnavailable):
            await documents.delete(digest)
        monkeypatch.setattr(documents._objects, "delete", delete)
        assert [info.digest for info in await documents.list()] == [digest]
        await documents.delete(digest)
        assert await documents._objects.keys("documents") == []
        await documents.put("text")


async def test_a_damaged_document_is_a_digest_mismatch(documents: DocumentStore, tmp_path: Path) -> None:
    digest = await documents.put("text")
    (tmp_path / "documents" / f"{digest[7:]}.txt").write_text("test")
    with pytest.raises(DigestMismatch):
        await documents.get(digest)
    await documents.put("text")
    assert await documents.get(digest) == "text"


async def test_the_same_text_of_two_tenants_is_two_documents(documents: DocumentStore) -> None:
    stores = [documents, documents.of("acme"), documents.of("acm")]
    digest = await documents.put("text", title="")
    for hidden in stores[1:]:
        assert await hidden.list() == []
        for refused in (hidden.get, hidden.info, hidden.delete):
            with pytest.raises(DocumentNotFound):
                await refused(digest)
    for title, other in zip("ab", stores[1:], strict=True):
        assert await other.put("text", title=title) == digest
    assert [(await each.info(digest)).title for each in stores] == ["", "a", "b"]
    assert [[info.title for info in await each.list()] for each in stores] == [[""], ["a"], ["b"]]
    await stores[1].delete(digest)
    assert [len(await each.list()) for each in stores] == [1, 0, 1]
    assert await documents.get(digest) == await stores[2].get(digest) == "text"


@pytest.mark.parametrize("tenant", ["..", "a/b", "Acme", "-a", "ab" * 32])
async def test_what_is_no_tenant_is_refused(documents: DocumentStore, tenant: str) -> None:
    for store in (documents, DatasetStore(documents._objects)):
        with pytest.raises(InvalidArgument):
            store.of(tenant)


@pytest.mark.parametrize("digest", ["", "blake3:..", "../secret", "blake3:" + "A" * 64])
async def test_what_is_no_digest_is_refused(documents: DocumentStore, digest: str) -> None:
    with pytest.raises(InvalidArgument):
        await documents.get(digest)


async def test_a_damaged_record_is_found_out_and_mended_by_putting_the_document_again(
    documents: DocumentStore, tmp_path: Path
) -> None:
    digest, other = await documents.put("text", title="one"), await documents.put("other")
    record = tmp_path / "documents" / f"{digest[7:]}.json"
    record.write_text(record.read_text().replace("one", "two"))
    with pytest.raises(DigestMismatch, match="damaged"):
        await documents.info(digest)
    assert [info.digest for info in await documents.list()] == [other]
    await documents.put("text", title="three")
    assert (await documents.info(digest)).title == "three"
    record.write_text("{")
    await documents.delete(digest)
    with pytest.raises(DocumentNotFound):
        await documents.info(digest)
