"""Documents, named by their content: texts that cartridges stand in for, and files of prompts.

Each tenant has its own: the same text of two tenants is two documents, and neither tells that there is another.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from functools import partial
from typing import Self

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
from foundry.tenants import check_tenant
from foundry.validation import Checked, Time


class DocumentInfo(Checked):
    """`created_at` is RFC 3339, UTC, of the first time that these bytes were put."""

    digest: str
    title: str
    num_bytes: int = Field(ge=0, le=2**53)
    created_at: Time


class DocumentStore:
    """The documents of one tenant."""

    def __init__(self, objects: Objects, *, max_document_bytes: int, tenant: str = "") -> None:
        self._objects, self._tenant = objects, check_tenant(tenant)
        self._max_document_bytes = max_document_bytes

    def of(self, tenant: str) -> Self:
        """Those of another tenant. Raises InvalidArgument unless it is spelt as one."""
        return type(self)(self._objects, max_document_bytes=self._max_document_bytes, tenant=tenant)

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
        await self._objects.put(layout.document(self._tenant, digest), [content])
        created_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        info = DocumentInfo(digest=digest, title=title, num_bytes=len(content), created_at=created_at)
        record = seal(info.model_dump()).encode()
        if not await self._objects.put_if_absent(self._record_of(digest), record):
            try:
                await self.info(digest)
            except DigestMismatch:
                await self._objects.put(self._record_of(digest), [record])
        return digest

    async def get(self, digest: str) -> str:
        """Raises DocumentNotFound, DigestMismatch."""
        key = layout.document(self._tenant, digest)
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
        key = self._record_of(digest)
        try:
            return await self._objects.record(key, partial(self._info, key))
        except NotFound as error:
            raise DocumentNotFound(f"there is no document {digest}", field="document") from error

    async def delete(self, digest: str) -> None:
        """Raises DocumentNotFound. Runs and cartridges that name the document keep its digest."""
        # The text first: what a crash leaves is still listed, `verify` says that its text is missing, and it can be
        # deleted again. A text without a record is what a `put` left that was cut off.
        keys = (layout.document(self._tenant, digest), self._record_of(digest))
        if not any([await self._objects.exists(key) for key in keys]):
            raise DocumentNotFound(f"there is no document {digest}", field="document")
        for key in keys:
            await self._objects.delete(key)

    # Last, because after it `list` means this method.
    async def list(self) -> list[DocumentInfo]:
        """All documents whose record is whole, oldest first."""
        return (await self.page(limit=sys.maxsize)).items

    async def page(self, *, after: str = "", limit: int) -> Page[DocumentInfo]:
        """Some of them, behind the digest `after`; only their records are read. Raises InvalidArgument."""
        entries = [
            (entry.last_modified, f"blake3:{match['hex']}")
            async for entry in self._objects.scan(layout.documents(self._tenant))
            if (match := layout.DOCUMENT.fullmatch(entry.key)) and match["tenant"] == self._tenant
        ]
        digests, next_after = cut([digest for _, digest in sorted(entries)], after, limit)
        infos = await self._objects.records("document", map(self._record_of, digests), self._info)
        return Page(list(infos.values()), next_after)

    def _record_of(self, digest: str) -> str:
        return layout.document_info(self._tenant, digest)

    def _info(self, key: str, content: bytes) -> DocumentInfo:
        info = DocumentInfo.model_validate(unseal(content))
        if self._record_of(info.digest) != key:
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
