"""Object storage (s3, gs, az, file): where durable truth lives. A typed edge around obstore.

Every put is atomic: a reader sees the whole object or none, also when the disk fills up half way (obstore writes
local files beside their place and links them in).
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import ObjectStore, from_url

from foundry.errors import FoundryError, NotFound, StoreFull, StoreUnavailable
from foundry.identity import Buffer

# EFBIG, ENOSPC and EDQUOT arrive as text only; the names are those of S3 servers with quotas.
_FULL = re.compile(r"(os error|\[Errno) (27|28|122)\b|QuotaExceeded|InsufficientStorage|507 Insufficient Storage")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    size: int


class Objects:
    """Keys and bytes. Raises StoreUnavailable, StoreFull or NotFound; nothing of obstore leaves this class."""

    def __init__(self, store: ObjectStore, root: Path | None) -> None:
        self._store = store
        # Set for file://, where durability needs an fsync that obstore does not do.
        self._root = root

    @classmethod
    def open(cls, url: str, *, retry_seconds: float) -> Objects:
        """Nothing is read or written, besides making the directory of a file:// store."""
        with _typed_errors(url):
            if url.startswith("file://"):
                root = Path(unquote(urlsplit(url).path))
                _make_directory(root)
                return cls(from_url(url), root)
            if url.startswith("memory://"):
                return cls(from_url(url), None)
            return cls(from_url(url, retry_config={"retry_timeout": timedelta(seconds=retry_seconds)}), None)

    async def put(self, key: str, parts: Iterable[Buffer]) -> None:
        """Write the concatenation of `parts`, over whatever stands there; they are not joined in memory."""
        with _typed_errors(key):
            await obstore.put_async(self._store, key, [memoryview(part).cast("B") for part in parts])
        await self._settle(key)

    async def put_if_absent(self, key: str, content: bytes) -> bool:
        """Write a small object unless there is one (If-None-Match: *). False if there was."""
        with _typed_errors(key):
            try:
                await obstore.put_async(self._store, key, content, mode="create")
            except AlreadyExistsError:
                return False
        await self._settle(key)
        return True

    async def get(self, key: str) -> memoryview:
        """Raises NotFound."""
        with _typed_errors(key):
            return memoryview(await (await obstore.get_async(self._store, key)).bytes_async())

    async def get_range(self, key: str, begin: int, end: int) -> memoryview:
        """Bytes [begin, end). Raises NotFound."""
        with _typed_errors(key):
            return memoryview(await obstore.get_range_async(self._store, key, start=begin, end=end))

    async def head(self, key: str) -> ObjectInfo:
        """Raises NotFound."""
        with _typed_errors(key):
            found = await obstore.head_async(self._store, key)
        return ObjectInfo(found["size"])

    async def exists(self, key: str) -> bool:
        try:
            with _typed_errors(key):
                await obstore.head_async(self._store, key)
        except NotFound:
            return False
        return True

    async def delete(self, key: str) -> None:
        """Nothing to delete is no error."""
        with _typed_errors(key), suppress(FileNotFoundError):
            await obstore.delete_async(self._store, key)

    async def keys(self, directory: str) -> list[str]:
        """Sorted keys under `directory`, however deep."""
        with _typed_errors(directory):
            found = await obstore.list(self._store, directory).collect_async()
        return sorted(entry["path"] for entry in found)

    async def keys_here(self, directory: str) -> list[str]:
        """Sorted keys directly in `directory`."""
        with _typed_errors(directory):
            found = await obstore.list_with_delimiter_async(self._store, directory)
        return sorted(entry["path"] for entry in found["objects"])

    async def _settle(self, key: str) -> None:
        if self._root is None:
            return
        with _typed_errors(key), suppress(FileNotFoundError):  # deleted again by somebody else
            await asyncio.to_thread(_fsync, self._root / key)


def _make_directory(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreUnavailable(f"can't make the object store's directory {root}: {error}") from error


def _fsync(path: Path) -> None:
    """What was reported as stored survives a power cut: the bytes first, then the directory entry."""
    for target in (path, path.parent):
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _typed_errors(what: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"object storage has no {what}") from error
    except (BaseError, OSError) as error:
        raise _typed(what, error) from error


def _typed(what: str, error: Exception) -> FoundryError:
    # obstore appends a page of debug output.
    text = str(error).split("\n\nDebug source", 1)[0]
    if _FULL.search(text):
        return StoreFull(f"object storage is full, {what} was not written: {text}")
    return StoreUnavailable(f"object storage failed at {what}: {text}")
