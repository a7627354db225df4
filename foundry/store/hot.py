"""Hot bytes: the tensors of the newest versions, in Redis, in chunks well under 4 MiB."""

from __future__ import annotations

import json
from dataclasses import asdict

from foundry.errors import DigestMismatch, InvalidArgument, ShapeMismatch
from foundry.identity import CartridgeBytes, CartridgeHeader
from foundry.store.connection import Connection, redis_errors

CHUNK_BYTES = 2 * 2**20
# Chunks per round trip: bounds what one reply or request holds in memory.
_BATCH = 8
# Bytes that no commit has claimed by then are garbage of a publisher that died.
_UNCLAIMED_SECONDS = 3600


class HotBytes:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def put(self, digest: str, stored: CartridgeBytes) -> None:
        """Write the bytes; they expire unless a commit keeps them. Raises StoreUnavailable or StoreFull."""
        redis = self._connection.redis
        view = memoryview(stored.data).cast("B")
        num_chunks = -(-len(view) // CHUNK_BYTES)
        with redis_errors():
            for begin in range(0, num_chunks, _BATCH):
                async with redis.pipeline(transaction=False) as batch:
                    for index in range(begin, min(begin + _BATCH, num_chunks)):
                        chunk = view[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
                        # NX: equal bytes may be in use already, and must not get an expiry from us.
                        batch.set(_chunk_key(digest, index), chunk, nx=True, ex=_UNCLAIMED_SECONDS)
                    await batch.execute()
            meta = json.dumps({"header": asdict(stored.header), "chunks": num_chunks})
            await redis.set(_key(digest), meta, nx=True, ex=_UNCLAIMED_SECONDS)

    async def get(self, digest: str) -> CartridgeBytes | None:
        """The bytes as Redis has them, unverified; None if a part is missing. Raises DigestMismatch if senseless."""
        redis = self._connection.redis
        with redis_errors():
            text = await redis.get(_key(digest))
            if text is None:
                return None
            try:
                meta = json.loads(text)
                header, num_chunks = CartridgeHeader.from_dict(meta["header"]), int(meta["chunks"])
            except (ValueError, KeyError, TypeError, InvalidArgument) as error:
                raise DigestMismatch(f"the hot copy of {digest} is corrupt: {error!r}") from error
            data = bytearray()
            for begin in range(0, num_chunks, _BATCH):
                keys = [_chunk_key(digest, index) for index in range(begin, min(begin + _BATCH, num_chunks))]
                chunks: list[bytes | None] = await redis.mget(keys)  # type: ignore[assignment]  # replies are not decoded
                for chunk in chunks:
                    if chunk is None:
                        return None
                    data += chunk
        try:
            return CartridgeBytes(header, memoryview(data).toreadonly())
        except ShapeMismatch as error:
            raise DigestMismatch(f"the hot copy of {digest} is corrupt: {error}") from error


def _key(digest: str) -> str:
    return f"foundry:bytes:{digest}"


def _chunk_key(digest: str, index: int) -> str:
    return f"foundry:bytes:{digest}:{index}"
