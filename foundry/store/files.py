"""Files of OpenAI's API: what batches read, and what they answer. Each belongs to a tenant and has an end."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Self

from pydantic import Field

from foundry.errors import DigestMismatch, FileNotKept, InvalidArgument, NotFound
from foundry.identity import Buffer, content_digest
from foundry.store.objects import layout
from foundry.store.objects.objects import Objects
from foundry.store.paging import Page, cut
from foundry.store.sealed import seal, unseal
from foundry.store.unreadable import reading
from foundry.tenants import check_tenant
from foundry.validation import Checked

_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"


def new_id(prefix: str) -> str:
    """One that nobody guesses."""
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(24))


class FileInfo(Checked):
    """Times are Unix time in seconds."""

    file_id: str
    filename: str
    purpose: str
    num_bytes: int = Field(ge=0, le=2**53)
    digest: str
    created_at: int
    expires_at: int


class FileStore:
    """The files of one tenant."""

    def __init__(self, objects: Objects, *, tenant: str = "") -> None:
        self._objects, self._tenant = objects, check_tenant(tenant)

    def of(self, tenant: str) -> Self:
        """Those of another tenant. Raises InvalidArgument unless it is spelt as one."""
        return type(self)(self._objects, tenant=tenant)

    async def put(
        self, content: Buffer, *, filename: str, purpose: str, keep_seconds: int, file_id: str | None = None
    ) -> FileInfo:
        """Keep bytes; those of a `file_id` that is there already are replaced by the same again."""
        file_id = file_id or new_id("file-")
        now = int(time.time())
        info = FileInfo(
            file_id=file_id,
            filename=filename,
            purpose=purpose,
            num_bytes=memoryview(content).nbytes,
            digest=content_digest(content),
            created_at=now,
            expires_at=now + keep_seconds,
        )
        await self._objects.put(layout.file(self._tenant, file_id, "bin"), [content])
        await self._objects.put(layout.file(self._tenant, file_id, "json"), [seal(info.model_dump()).encode()])
        return info

    async def info(self, file_id: str) -> FileInfo:
        """Raises FileNotKept, also for one whose time is over, DigestMismatch."""
        info = await self._record(file_id)
        if info.expires_at <= time.time():
            raise _missing(file_id)
        return info

    async def expires_at(self, file_id: str) -> int:
        """Also of one whose time is over. Raises FileNotKept, DigestMismatch."""
        return (await self._record(file_id)).expires_at

    async def content(self, file_id: str) -> memoryview:
        """Raises FileNotKept, DigestMismatch."""
        info = await self.info(file_id)
        key = layout.file(self._tenant, file_id, "bin")
        try:
            with reading(key):
                content = await self._objects.get(key)
                if (found := content_digest(content)) != info.digest:
                    raise DigestMismatch(f"the file's bytes hash to {found}, its record says {info.digest}")
                return content
        except NotFound as error:
            raise _missing(file_id) from error

    async def delete(self, file_id: str) -> None:
        """Raises FileNotKept."""
        await self.info(file_id)
        await self.drop(file_id)

    async def drop(self, file_id: str) -> None:
        """What is left of it; nothing is no error."""
        for suffix in ("bin", "json"):
            await self._objects.delete(layout.file(self._tenant, file_id, suffix))

    async def list(self) -> list[FileInfo]:
        """Newest first; those whose time is over and those that can't be read are left out."""
        return (await self.page(limit=sys.maxsize)).items

    async def page(
        self, *, after: str = "", limit: int, purpose: str | None = None, oldest_first: bool = False
    ) -> Page[FileInfo]:
        """Some of them, behind the file `after`. Raises InvalidArgument."""
        entries = [
            (entry.last_modified, match["id"])
            async for entry in self._objects.scan(layout.files(self._tenant))
            if (match := layout.FILE.fullmatch(entry.key))
        ]
        ids, next_after = cut([file_id for _, file_id in sorted(entries, reverse=not oldest_first)], after, limit)
        infos = await self._read(ids)
        now = time.time()
        kept = [info for info in infos if info.expires_at > now and purpose in (None, info.purpose)]
        return Page(kept, next_after)

    async def _record(self, file_id: str) -> FileInfo:
        try:
            record = layout.file(self._tenant, file_id, "json")
            return await self._objects.record(record, partial(_info, record))
        except (NotFound, InvalidArgument) as error:
            raise _missing(file_id) from error

    async def _read(self, ids: Sequence[str]) -> Iterable[FileInfo]:
        records = [layout.file(self._tenant, file_id, "json") for file_id in ids]
        return (await self._objects.records("file", records, _info)).values()


def _info(key: str, content: bytes) -> FileInfo:
    info = FileInfo.model_validate(unseal(content))
    if not key.endswith(f"/{info.file_id}.json"):
        raise InvalidArgument(f"it is the record of {info.file_id}")
    return info


def _missing(file_id: str) -> FileNotKept:
    return FileNotKept(f"there is no file {file_id[:100]}", field="file_id")
