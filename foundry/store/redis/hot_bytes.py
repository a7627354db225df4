"""Hot bytes: the tensors of the newest versions, in Redis, layer by layer in chunks well under 4 MiB (redis/keys.py).

An upload goes to its own keys and is moved under the digest by the commit, so bytes under a digest are always whole,
publishers never write into each other's, and the digest may be computed while they are sent. What no commit takes
expires.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TypeVar

from foundry.errors import DigestMismatch, NotFound, StoreUnavailable
from foundry.identity import CartridgeBytes, CartridgeHeader
from foundry.store import metrics
from foundry.store.incoming import Incoming
from foundry.store.redis import transfer as bulk
from foundry.store.redis.connection import Connection, redis_errors
from foundry.store.redis.keys import key
from foundry.store.unreadable import reading
from foundry.untrusted import parse_object

CHUNK_BYTES = 2 * 2**20
# An upload must be committed by then; what is left of publishers that died takes memory no longer.
STAGED_SECONDS = 600
# Transfers at once, of one process; each takes the memory of a cartridge.
_MAX_TRANSFERS = 4

T = TypeVar("T")


class HotBytes:
    def __init__(self, connection: Connection, *, max_cartridge_bytes: int) -> None:
        self._connection = connection
        self._max_cartridge_bytes = max_cartridge_bytes
        # Threads of their own: transfers wait for the network, and must not keep others from hashing or decoding.
        self._threads = ThreadPoolExecutor(_MAX_TRANSFERS, thread_name_prefix="hot bytes")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def stage(self, token: str, stored: CartridgeBytes) -> None:
        """Upload under the keys of `token`. Raises StoreUnavailable or StoreFull."""
        view = memoryview(stored.data).cast("B")
        pieces = [(key("staged", token, i), view[begin:end]) for i, (begin, end) in enumerate(chunks(stored.header))]
        with metrics.STAGE_SECONDS.labels("publish", "send").time():
            await self._in_thread(
                lambda: bulk.send(self._connection.open_blocking, pieces, expire_seconds=STAGED_SECONDS)
            )
        metrics.BYTES.labels("sent", "hot").inc(view.nbytes)

    async def header(self, digest: str) -> CartridgeHeader | None:
        """What the bytes are said to be; None if there are none. Raises DigestMismatch if senseless."""
        with redis_errors(f"reading {key('bytes', digest)}"):
            text = await self._connection.redis.get(key("bytes", digest))
        if text is None:
            return None
        if not isinstance(text, bytes):
            raise StoreUnavailable(f"Redis answered {text!r} when asked for {key('bytes', digest)}")
        header = header_of(digest, text)
        if header.num_bytes > self._max_cartridge_bytes:
            raise DigestMismatch(f"the hot copy of {digest} claims {header.num_bytes} bytes, more than is ever stored")
        return header

    async def get(self, digest: str) -> CartridgeBytes | None:
        """The bytes, verified; None if a part is missing. Raises DigestMismatch if they are not what `digest` names."""
        header = await self.header(digest)
        if header is None:
            return None
        try:
            return await self._in_thread(lambda: self._receive(digest, header))
        except NotFound:
            return None

    def _receive(self, digest: str, header: CartridgeHeader) -> CartridgeBytes:
        with Incoming(header) as incoming:
            bounds = chunks(header)
            pieces = [(key("bytes", digest, i), incoming.memory[begin:end]) for i, (begin, end) in enumerate(bounds)]
            with metrics.STAGE_SECONDS.labels("fetch", "receive").time():
                for num_filled in bulk.receive(self._connection.open_blocking, pieces):
                    incoming.landed(bounds[num_filled - 1][1])
            metrics.BYTES.labels("received", "hot").inc(header.num_bytes)
            return incoming.finish(digest)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def header_of(digest: str, meta: str | bytes) -> CartridgeHeader:
    """What the value of `bytes:<digest>` says. Raises DigestMismatch if senseless."""
    with reading(f"the hot copy of {digest}"):
        return CartridgeHeader.from_dict(parse_object(meta)["header"])


def chunks(header: CartridgeHeader) -> list[tuple[int, int]]:
    """Bounds of the chunks: no chunk holds bytes of two layers."""
    bounds = []
    for layer in range(header.num_layers):
        begin, end = layer * header.layer_bytes, (layer + 1) * header.layer_bytes
        bounds += [(at, min(at + CHUNK_BYTES, end)) for at in range(begin, end, CHUNK_BYTES)]
    return bounds


def meta(header: CartridgeHeader) -> str:
    """The value of `bytes:<digest>`; scripts read the number of chunks off its end."""
    return json.dumps({"header": asdict(header), "chunks": len(chunks(header))})
