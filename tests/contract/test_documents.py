"""Documents: named by content, refused when they are no text."""

from __future__ import annotations

from pathlib import Path

import pytest

from foundry.errors import DigestMismatch, DocumentNotFound, DocumentTooLong, DocumentUnreadable, InvalidArgument
from foundry.identity import content_digest
from foundry.store import DocumentStore, Objects

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


async def test_a_damaged_document_is_a_digest_mismatch(documents: DocumentStore, tmp_path: Path) -> None:
    digest = await documents.put("text")
    (tmp_path / "documents" / f"{digest[7:]}.txt").write_text("test")
    with pytest.raises(DigestMismatch):
        await documents.get(digest)
    await documents.put("text")
    assert await documents.get(digest) == "text"


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
