"""Object storage (s3, gs, az, file): where durable truth lives. A typed edge around obstore.

Every put is atomic: a reader sees the whole object or none, also when the disk fills up half way (obstore writes
local files beside their place and links them in).

Compare-and-set is the storage's own for s3, gs and az (If-Match on the ETag or generation). Directories have none:
there all writers of one store take turns by a lock (flock) on the file `.lock` in its root. A process that dies gives
the lock back; one that is stopped while it holds it makes the others fail after ten seconds.
"""

from __future__ import annotations

import asyncio
import atexit
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PreconditionError,
)
from obstore.store import ObjectStore, from_url

from foundry.errors import InvalidArgument, NotFound, StoreRefused, StoreUnavailable
from foundry.identity import Buffer
from foundry.store.credentials import S3Access
from foundry.store.objects.directory import LOCK, fsync, locked, make_directory
from foundry.store.objects.refusals import NO_BUCKET, text_of, typed
from foundry.store.signatures import LINE_BYTES, Signer
from foundry.store.unreadable import REFUSALS, reading, skipped
from foundry.untrusted import MAX_RECORD_BYTES

if TYPE_CHECKING:
    from obstore import ObjectMeta, UpdateVersion

# Larger objects are sent in parts, several at a time.
_ONE_REQUEST_BYTES = 5 * 2**20
_LIST_PAGE = 1000
_READS_OF_DAMAGED = 3
# Each holds the bytes of one.
_RECORDS_AT_ONCE = 16
# What is parsed off the event loop.
_MIN_THREAD_BYTES = 2**16
_LET_GO_SECONDS = 0.1
_SLOWEST_BYTES_PER_SECOND = 2**20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ETag:
    """Which content an object had; only good for `put_if_match`. gs tells contents apart by `generation`."""

    etag: str | None
    generation: str | None = None


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a listing says of an object. `size` is in bytes, `last_modified` in UTC by the storage's clock."""

    key: str
    size: int
    last_modified: datetime
    etag: ETag


class Objects:
    """Keys and bytes. Nothing of obstore leaves this class.

    All methods raise StoreUnavailable while the storage can't be reached, StoreRefused if it does not take our
    credentials or has no such bucket, and StoreFull if it takes no more; those that read an object raise NotFound.

    Records (`is_record`) are signed as they are written, where there is a key for it, and must then be signed to be
    read.
    """

    def __init__(self, store: ObjectStore, url: str, root: Path | None, timeout_seconds: float, signer: Signer) -> None:
        self.signer = signer
        self._store = store
        self._url = url
        self._timeout_seconds = timeout_seconds
        # Set for file://, where durability needs an fsync and compare-and-set a lock that obstore does not do.
        self._root = root
        self._records = asyncio.Semaphore(_RECORDS_AT_ONCE)

    @classmethod
    def open(
        cls,
        url: str,
        *,
        retry_seconds: float,
        timeout_seconds: float = 90.0,
        s3: S3Access | None = None,
        signer: Signer | None = None,
    ) -> Objects:
        """Nothing is read or written, besides making the directory of a file:// store.

        `timeout_seconds` is for one call with all its repetitions; to it comes what its bytes take at 1 MiB a second.

        `s3` wins over the AWS_* variables of the environment; gs and az have theirs (GOOGLE_*, AZURE_*) alone. Without
        `signer` nothing is signed.
        """
        signer = signer or Signer()
        atexit.register(_let_go)
        try:
            if url.startswith("file://"):
                root = Path(unquote(urlsplit(url).path))
                make_directory(root)
                return cls(from_url(url), url, root, timeout_seconds, signer)
            if url.startswith("memory://"):
                return cls(from_url(url), url, None, timeout_seconds, signer)
            options: dict[str, Any] = {"retry_config": {"retry_timeout": timedelta(seconds=retry_seconds)}}
            if s3 is not None:
                options |= s3.options()
            return cls(from_url(url, **options), url, None, timeout_seconds, signer)
        except (BaseError, ValueError, TypeError) as error:
            raise InvalidArgument(
                f"object storage {url} can't be opened: {text_of(error)}", field="objects_url"
            ) from None

    # Writing

    async def put(self, key: str, parts: Iterable[Buffer]) -> None:
        """Write the concatenation of `parts`, over whatever stands there; large ones are not joined in memory."""
        if is_record(key):
            parts = [self._signed(key, b"".join(parts))]
        views = [memoryview(part).cast("B") for part in parts]
        num_bytes = sum(view.nbytes for view in views)
        content = b"".join(views) if num_bytes <= _ONE_REQUEST_BYTES else views
        async with self._call(key, writing=True, num_bytes=num_bytes):
            await obstore.put_async(self._store, key, content)
        await self._settle(key)

    async def put_if_absent(self, key: str, content: bytes) -> bool:
        """Write a small object unless there is one (If-None-Match: *). False if there was.

        That may be our own, where an answer was lost and the storage's client asked again.
        """
        content = self._signed(key, content)
        async with self._call(key, writing=True):
            try:
                await obstore.put_async(self._store, key, content, mode="create")
            except AlreadyExistsError:
                return False
        await self._settle(key)
        return True

    async def put_if_match(self, key: str, content: bytes, etag: ETag) -> bool:
        """Write a small object if its content is still the one that `etag` names (If-Match). False if it is not.

        False also if our own write was repeated after its answer was lost: read again before you conclude anything.
        Only writers that use this method (and `put_if_absent` before the first one) exclude each other.
        """
        content = self._signed(key, content)
        async with self._call(key, writing=True):
            if self._root is not None:
                return await asyncio.to_thread(_put_file_if_match, self._store, self._root, key, content, etag)
            expected: UpdateVersion = {}
            if etag.etag is not None:
                expected["e_tag"] = etag.etag
            if etag.generation is not None:
                expected["version"] = etag.generation
            try:
                await obstore.put_async(self._store, key, content, mode=expected)
            except PreconditionError:
                return False
            except FileNotFoundError as error:
                if NO_BUCKET.search(str(error)):
                    raise
                return False
        return True

    async def delete(self, key: str) -> None:
        """Nothing to delete is no error."""
        async with self._call(key, writing=True):
            try:
                await obstore.delete_async(self._store, key)
            except FileNotFoundError as error:
                if NO_BUCKET.search(str(error)):
                    raise

    # Reading

    async def get(self, key: str, *, max_bytes: int | None = None) -> memoryview:
        """Raises NotFound; InvalidArgument if it has more than `max_bytes`, of which none are read then."""
        async with self._call(key) as deadline:
            found = await obstore.get_async(self._store, key)
            if max_bytes is not None and found.meta["size"] > max_bytes:
                raise InvalidArgument(f"it has {found.meta['size']} bytes, at most {max_bytes} are read")
            deadline.reschedule((deadline.when() or 0.0) + found.meta["size"] / _SLOWEST_BYTES_PER_SECOND)
            return memoryview(await found.bytes_async())

    async def record(self, key: str, parse: Callable[[bytes], T], *, max_bytes: int = MAX_RECORD_BYTES) -> T:
        """What `parse` makes of a small object. Raises NotFound; DigestMismatch, which names the key, if `parse`
        refuses it, its signature is not what it should be or it is larger than `max_bytes`.

        What is refused is read again: the damage may have been on the way.
        """
        async with self._records:
            with reading(key):
                for _ in range(_READS_OF_DAMAGED - 1):
                    with suppress(*REFUSALS):
                        return await self._parsed(key, parse, max_bytes)
                return await self._parsed(key, parse, max_bytes)

    async def _parsed(self, key: str, parse: Callable[[bytes], T], max_bytes: int) -> T:
        stored = bytes(await self.get(key, max_bytes=max_bytes + LINE_BYTES))

        def read() -> T:
            return parse(self.signer.opened(key, stored))

        # A large one takes seconds, most of all where somebody made it to.
        return read() if len(stored) < _MIN_THREAD_BYTES else await asyncio.to_thread(read)

    async def records(self, kind: str, keys: Iterable[str], parse: Callable[[str, bytes], T]) -> dict[str, T]:
        """What `parse` makes of the keys and their small objects, by key. Left out are those that are gone, and those
        that can't be read, which are logged and counted as `kind`."""

        async def read(key: str) -> Iterable[tuple[str, T]]:
            with suppress(NotFound), skipped(kind, key):
                return [(key, await self.record(key, partial(parse, key)))]
            return []

        found = await asyncio.gather(*map(read, keys))
        return dict(chain.from_iterable(found))

    async def get_range(self, key: str, begin: int, end: int) -> memoryview:
        """Bytes `begin` up to, not including, `end`. Raises NotFound, and InvalidArgument unless all of them exist."""
        if not 0 <= begin <= end:
            raise InvalidArgument(f"{begin}..{end} is not a range of bytes", field="range")
        if begin == end:
            await self.head(key)
            return memoryview(b"")
        try:
            async with self._call(key, num_bytes=end - begin):
                found = memoryview(await obstore.get_range_async(self._store, key, start=begin, end=end))
        except StoreRefused:
            raise
        except StoreUnavailable:
            # Storages differ in what they call a range that begins behind the end.
            found = memoryview(b"")
            if (await self.head(key)).size > begin:
                raise
        if found.nbytes != end - begin:
            raise InvalidArgument(f"{self._url} {key} has no bytes {begin}..{end}, it is shorter", field="range")
        return found

    async def head(self, key: str) -> ObjectInfo:
        """Size, time and ETag without the bytes. Raises NotFound."""
        async with self._call(key):
            return _info(await obstore.head_async(self._store, key))

    async def exists(self, key: str) -> bool:
        """False also if there is no such bucket: the answer to a HEAD does not tell."""
        try:
            await self.head(key)
        except NotFound:
            return False
        return True

    # Listing

    async def scan(self, directory: str) -> AsyncIterator[ObjectInfo]:
        """Every object under `directory`, however deep, in no order; one page is held at a time."""
        pages = aiter(obstore.list(self._store, directory, chunk_size=_LIST_PAGE))
        while True:
            async with self._call(directory):
                try:
                    page = await anext(pages)
                except StopAsyncIteration:
                    return
            for entry in page:
                if entry["path"] != LOCK:
                    yield _info(entry)

    async def keys(self, directory: str) -> list[str]:
        """Sorted keys under `directory`, however deep."""
        return sorted([info.key async for info in self.scan(directory)])

    async def keys_here(self, directory: str) -> list[str]:
        """Sorted keys directly in `directory`."""
        async with self._call(directory):
            found = await obstore.list_with_delimiter_async(self._store, directory)
        return sorted(entry["path"] for entry in found["objects"] if entry["path"] != LOCK)

    async def check(self) -> None:
        """Raises what any other call would raise: asks for a key that is never written."""
        async for _ in self.scan("never/written"):
            pass

    def _signed(self, key: str, content: bytes) -> bytes:
        return self.signer.signed(key, content) if is_record(key) else content

    async def _settle(self, key: str) -> None:
        if self._root is None:
            return
        async with self._call(key):
            with suppress(FileNotFoundError):  # deleted again by somebody else
                await asyncio.to_thread(fsync, self._root / key)

    @asynccontextmanager
    async def _call(self, key: str, *, writing: bool = False, num_bytes: int = 0) -> AsyncIterator[asyncio.Timeout]:
        """Errors are ours, and there is a deadline: a directory that hangs never answers, nor says so. What hangs is
        abandoned."""
        what = f"object storage {self._url}"
        seconds = self._timeout_seconds + num_bytes / _SLOWEST_BYTES_PER_SECOND
        try:
            async with asyncio.timeout(seconds) as deadline:
                yield deadline
        except TimeoutError:
            raise StoreUnavailable(f"{what} has not answered for {seconds:.0f} s at {key}") from None
        except (BaseError, OSError) as error:
            # Not `from error`: its text may hold a signed address, and would stand in every traceback.
            raise typed(what, key, error, writing=writing, directory=self._root is not None) from None


def is_record(key: str) -> bool:
    """Whether something is believed because it stands there: all but bytes that a record names by their digest, and
    objects without content."""
    return key.endswith((".json", ".jsonl"))


def _let_go() -> None:
    """obstore's threads hold objects of a call for a moment after it has returned, and end the process with SIGABRT if
    the interpreter has gone meanwhile (0.12.1: 3 of 25 processes that ended right after a call)."""
    atexit.unregister(_let_go)
    time.sleep(_LET_GO_SECONDS)


def _etag(meta: ObjectMeta) -> ETag:
    return ETag(meta["e_tag"], meta["version"])


def _info(meta: ObjectMeta) -> ObjectInfo:
    return ObjectInfo(meta["path"], meta["size"], meta["last_modified"], _etag(meta))


def _put_file_if_match(store: ObjectStore, root: Path, key: str, content: bytes, etag: ETag) -> bool:
    with locked(root / LOCK):
        try:
            standing = obstore.head(store, key)
        except FileNotFoundError:
            return False
        if _etag(standing) != etag:
            return False
        obstore.put(store, key, content)
        fsync(root / key)
    return True
