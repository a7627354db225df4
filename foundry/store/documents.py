"""Documents, named by their content: texts that cartridges stand in for, and files of prompts."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from functools import partial

from pydantic import Field

from foundry.errors import (
    DigestMismatch,
    DocumentNotFound,
    DocumentTooLong,
    DocumentUnreadable,
    InvalidArgument,
    NotFound,
)
from foundry.identity import content_digest
from foundry.store.objects import layout
from foundry.store.objects.objects import Objects
from foundry.store.paging import Page, cut
from foundry.store.sealed import seal, unseal
from foundry.store.unreadable import reading
from foundry.validation import Checked, Time


class DocumentInfo(Checked):
    """`created_at` is RFC 3339, UTC, of the first time that these bytes were put."""

    digest: str
    title: str
    num_bytes: int = Field(ge=0, le=2**53)
    created_at: Time


class DocumentStore:
    def __init__(self, objects: Objects, *, max_document_bytes: int) -> None:
        self._objects = objects
        self._max_document_bytes = max_document_bytes

    async def put(self, document: str | bytes, *, title: str = "") -> str:
        """Keep a text and return its digest; a text that is there already keeps its title and date.

        Raises DocumentUnreadable for what is empty or no UTF-8 text, DocumentTooLong beyond `max_document_bytes`.
        """
        content = readable(document)
        if len(content) > self._max_document_bytes:
            raise DocumentTooLong(
                f"the document has {len(content)} bytes, the store takes at most {self._max_document_bytes}",
                field="document",
            )
        digest = content_digest(content)
        # Also over a text that stands: it is the same, unless it is damaged, and then this repairs it.
        await self._objects.put(layout.document(digest), [content])
        created_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        info = DocumentInfo(digest=digest, title=title, num_bytes=len(content), created_at=created_at)
        record = seal(info.model_dump()).encode()
        if not await self._objects.put_if_absent(layout.document_info(digest), record):
            try:
                await self.info(digest)
            except DigestMismatch:
                await self._objects.put(layout.document_info(digest), [record])
        return digest

    async def get(self, digest: str) -> str:
        """Raises DocumentNotFound, DigestMismatch."""
        key = layout.document(digest)
        try:
            with reading(key):
                content = bytes(await self._objects.get(key, max_bytes=self._max_document_bytes))
                if (found := content_digest(content)) != digest:
                    raise DigestMismatch(f"document bytes hash to {found}, expected {digest}")
                return content.decode()
        except NotFound as error:
            raise DocumentNotFound(f"there is no document {digest}", field="document") from error

    async def info(self, digest: str) -> DocumentInfo:
        """Raises DocumentNotFound, DigestMismatch if the record is damaged: putting the document again mends it."""
        key = layout.document_info(digest)
        try:
            return await self._objects.record(key, partial(_info, key))
        except NotFound as error:
            raise DocumentNotFound(f"there is no document {digest}", field="document") from error

    async def delete(self, digest: str) -> None:
        """Raises DocumentNotFound. Runs and cartridges that name the document keep its digest."""
        if not await self._objects.exists(layout.document_info(digest)):
            raise DocumentNotFound(f"there is no document {digest}", field="document")
        await self._objects.delete(layout.document_info(digest))
        await self._objects.delete(layout.document(digest))

    # Last, because after it `list` means this method.
    async def list(self) -> list[DocumentInfo]:
        """All documents whose record is whole, oldest first."""
        return (await self.page(limit=sys.maxsize)).items

    async def page(self, *, after: str = "", limit: int) -> Page[DocumentInfo]:
        """Some of them, behind the digest `after`; only their records are read. Raises InvalidArgument."""
        entries = [
            (entry.last_modified, f"blake3:{match['hex']}")
            async for entry in self._objects.scan(layout.DOCUMENTS)
            if (match := layout.DOCUMENT.fullmatch(entry.key))
        ]
        digests, next_after = cut([digest for _, digest in sorted(entries)], after, limit)
        infos = await self._objects.records("document", map(layout.document_info, digests), _info)
        return Page(list(infos.values()), next_after)


def _info(key: str, content: bytes) -> DocumentInfo:
    info = DocumentInfo.model_validate(unseal(content))
    if layout.document_info(info.digest) != key:
        raise InvalidArgument(f"it is the record of {info.digest}")
    return info


def readable(document: str | bytes) -> bytes:
    """Raises DocumentUnreadable for what is empty or no UTF-8 text."""
    try:
        content = document.encode() if isinstance(document, str) else document
        text = content.decode()
    except UnicodeError as error:
        raise DocumentUnreadable(f"the document is not UTF-8 text: {error}", field="document") from error
    if "\0" in text:
        raise DocumentUnreadable("the document has NUL characters: it is not a text", field="document")
    if not text.strip():
        raise DocumentUnreadable("the document is empty", field="document")
    return content
