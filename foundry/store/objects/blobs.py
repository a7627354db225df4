"""Blobs: the bytes of durable versions in object storage, each named by its digest and read as what that names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress

from foundry.errors import DigestMismatch, InvalidArgument, NotFound, ShapeMismatch
from foundry.identity import CartridgeBytes, CartridgeHeader, Digester, prologue_bytes, read_prologue
from foundry.store import metrics
from foundry.store.incoming import Incoming
from foundry.store.objects import layout
from foundry.store.objects.objects import ObjectInfo, Objects
from foundry.tasks import end

# What a cartridge file's prologue rarely exceeds.
_PROLOGUE_GUESS_BYTES = 2**16
# Large enough that a request's own cost does not show, small enough that a repeated one does not hurt.
_RANGE_BYTES = 2**23
_RANGES_AT_ONCE = 4


class Blobs:
    def __init__(self, objects: Objects, *, max_cartridge_bytes: int) -> None:
        self._objects = objects
        self._max_cartridge_bytes = max_cartridge_bytes

    async def put(self, digest: str, stored: CartridgeBytes) -> None:
        # Also over a blob that stands: the bytes are the same, unless it is corrupt, and then this repairs it.
        await self._objects.put(layout.blob(digest), stored.file_parts())
        metrics.BYTES.labels("sent", "durable").inc(stored.header.num_bytes)

    async def get(self, digest: str) -> CartridgeBytes | None:
        """The bytes, verified; None if there are none. Raises DigestMismatch if they are not what `digest` names.

        Read in ranges of whole layers, several at once, each repeated by itself when it is cut.
        """
        key = layout.blob(digest)
        with suppress(NotFound), _corrupt_if_no_cartridge(digest):
            header, begin = await self._read_prologue(key)
            with Incoming(header) as incoming:
                with metrics.STAGE_SECONDS.labels("fetch", "receive").time():
                    await self._fill(incoming, key, begin)
                metrics.BYTES.labels("received", "durable").inc(header.num_bytes)
                return await asyncio.to_thread(incoming.finish, digest)
        return None

    async def check(self, digest: str) -> int | None:
        """Bytes of the blob, hashed range by range; None if there is none. Raises DigestMismatch."""
        key = layout.blob(digest)
        with suppress(NotFound), _corrupt_if_no_cartridge(digest):
            header, begin = await self._read_prologue(key)
            digester = Digester(header)
            for at in range(begin, begin + header.num_bytes, _RANGE_BYTES):
                end = min(at + _RANGE_BYTES, begin + header.num_bytes)
                await asyncio.to_thread(digester.update, await self._objects.get_range(key, at, end))
            if (found := digester.digest()) != digest:
                raise DigestMismatch(f"the blob of {digest} is corrupt: it hashes to {found}")
            return header.num_bytes
        return None

    async def exists(self, digest: str) -> bool:
        return await self._objects.exists(layout.blob(digest))

    async def entries(self) -> AsyncIterator[tuple[str, ObjectInfo]]:
        """All blobs, with the digests that they are named by, in no order."""
        async for entry in self._objects.scan(layout.BLOBS):
            if match := layout.BLOB.fullmatch(entry.key):
                yield f"blake3:{match['hex']}", entry

    async def entry(self, digest: str) -> ObjectInfo | None:
        with suppress(NotFound):
            return await self._objects.head(layout.blob(digest))
        return None

    async def delete(self, digest: str) -> None:
        await self._objects.delete(layout.blob(digest))

    async def header(self, digest: str) -> CartridgeHeader | None:
        """What the blob's beginning says it is; None if there is none. Raises DigestMismatch if senseless."""
        with suppress(NotFound), _corrupt_if_no_cartridge(digest):
            return (await self._read_prologue(layout.blob(digest)))[0]
        return None

    async def _read_prologue(self, key: str) -> tuple[CartridgeHeader, int]:
        size = (await self._objects.head(key)).size
        content = await self._objects.get_range(key, 0, min(size, _PROLOGUE_GUESS_BYTES))
        if (length := prologue_bytes(content)) > len(content):
            content = await self._objects.get_range(key, 0, min(size, length))
        header, begin = read_prologue(content)
        if header.num_bytes > self._max_cartridge_bytes:
            raise InvalidArgument(f"it claims {header.num_bytes} bytes, at most {self._max_cartridge_bytes} are read")
        if size != begin + header.num_bytes:
            raise ShapeMismatch(f"the file has {size} bytes, its header says {begin + header.num_bytes}")
        return header, begin

    async def _fill(self, incoming: Incoming, key: str, begin: int) -> None:
        layers = max(1, _RANGE_BYTES // incoming.header.layer_bytes)
        step, size = layers * incoming.header.layer_bytes, incoming.header.num_bytes
        reads = asyncio.Semaphore(_RANGES_AT_ONCE)

        async def read(at: int) -> None:
            end = min(at + step, size)
            async with reads:
                part = await self._objects.get_range(key, begin + at, begin + end)
            if part.nbytes != end - at:
                raise ShapeMismatch(f"{part.nbytes} bytes came where {end - at} were asked for")
            incoming.memory[at:end] = part

        tasks = [asyncio.create_task(read(at)) for at in range(0, size, step)]
        try:
            for index, task in enumerate(tasks):
                await task
                incoming.landed(min((index + 1) * step, size))
        finally:
            await end(*tasks)


@contextmanager
def _corrupt_if_no_cartridge(digest: str) -> Iterator[None]:
    """Raises DigestMismatch where a file is read that is no cartridge's."""
    try:
        yield
    except (InvalidArgument, ShapeMismatch) as error:
        raise DigestMismatch(f"the blob of {digest} is corrupt: {error}") from error
