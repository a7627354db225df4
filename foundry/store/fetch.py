"""Fetching the bytes that a digest names: from Redis while it has them, else from object storage, and verified."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import structlog
from opentelemetry import trace

from foundry.errors import CartridgeNotFound, DigestMismatch, StoreUnavailable
from foundry.identity import CartridgeBytes, CartridgeHeader
from foundry.store import metrics
from foundry.store.objects.blobs import Blobs
from foundry.store.redis.hot_bytes import HotBytes
from foundry.store.redis.pointers import Pointers
from foundry.tasks import end

log = structlog.get_logger(__name__)
_tracer = trace.get_tracer(__name__)


class Fetcher:
    """See `CartridgeStore.fetch` and `CartridgeStore.header`."""

    def __init__(self, pointers: Pointers, blobs: Blobs, hot: HotBytes) -> None:
        self._pointers, self._blobs, self._hot = pointers, blobs, hot
        self._transfers: dict[str, asyncio.Task[CartridgeBytes]] = {}

    async def header(self, digest: str) -> CartridgeHeader:
        failure: StoreUnavailable | DigestMismatch | None = None
        try:
            if (hot := await self._hot.header(digest)) is not None:
                return hot
        except (StoreUnavailable, DigestMismatch) as error:
            failure = error
        if (blob := await self._blobs.header(digest)) is not None:
            return blob
        raise failure or _not_found(digest)

    async def fetch(self, digest: str) -> CartridgeBytes:
        task = self._transfers.get(digest)
        if task is None:
            task = self._transfers[digest] = asyncio.create_task(self._transfer(digest))
            task.add_done_callback(lambda _: self._transfers.pop(digest, None))
        # Shielded: the first caller may give up while others still wait.
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Ends the transfers under way."""
        await end(*self._transfers.values())

    async def _transfer(self, digest: str) -> CartridgeBytes:
        with (
            _tracer.start_as_current_span("store.fetch", attributes={"foundry.digest": digest}),
            metrics.STAGE_SECONDS.labels("fetch", "total").time(),
        ):
            return await self._hot_or_durable(digest)

    async def _hot_or_durable(self, digest: str) -> CartridgeBytes:
        failure: StoreUnavailable | DigestMismatch | None = None
        try:
            if (hot := await self._hot.get(digest)) is not None:
                metrics.FETCHED.labels("hot").inc()
                return hot
        except StoreUnavailable as error:
            failure = error
        except DigestMismatch as error:
            failure = error
            metrics.MISMATCHES.labels("hot").inc()
            log.error("hot_bytes_corrupt", digest=digest, error=error.message)
            with suppress(StoreUnavailable, DigestMismatch):
                await self._pointers.drop_bytes(digest)
        try:
            blob = await self._blobs.get(digest)
        except DigestMismatch:
            metrics.MISMATCHES.labels("durable").inc()
            raise
        if blob is not None:
            metrics.FETCHED.labels("durable").inc()
            return blob
        raise failure or _not_found(digest)


def _not_found(digest: str) -> CartridgeNotFound:
    return CartridgeNotFound(f"no cartridge has digest {digest}", field="digest")
