"""Publishing a version: bytes, manifest, pointer, in this order. Why it is right: docs/store-protocol.md"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from opentelemetry import trace

from foundry.errors import StoreUnavailable
from foundry.identity import CartridgeBytes
from foundry.store import metrics
from foundry.store.manifest import Manifest, ManifestDraft
from foundry.store.objects.versions import Durable
from foundry.store.redis.hot_bytes import HotBytes, chunks
from foundry.store.redis.pointers import Commit, LimitReached, Pointers, Reservation
from foundry.store.settings import StoreSettings
from foundry.store.upkeep.marks import while_marked

_ATTEMPTS = 3
_tracer = trace.get_tracer(__name__)

Keep = Callable[[Manifest, CartridgeBytes], Awaitable[None]]
"""Makes a version that Redis shows durable, with the bytes at hand."""


class Publisher:
    """See `CartridgeStore.publish`."""

    def __init__(
        self, pointers: Pointers, durable: Durable, hot: HotBytes, settings: StoreSettings, keep: Keep
    ) -> None:
        self._pointers, self._durable, self._hot = pointers, durable, hot
        self._settings, self._keep = settings, keep

    async def publish(self, stored: CartridgeBytes, draft: ManifestDraft, *, durable: bool) -> Manifest:
        about: dict[str, str | int] = {
            "foundry.name": draft.name,
            "foundry.step": draft.step,
            "foundry.durable": durable,
        }
        with (
            _tracer.start_as_current_span("store.publish", attributes=about) as span,
            metrics.STAGE_SECONDS.labels("publish", "total").time(),
        ):
            manifest = await self._publish(stored, draft, durable=durable)
            span.set_attributes({"foundry.version": manifest.version, "foundry.digest": manifest.digest})
            return manifest

    async def _publish(self, stored: CartridgeBytes, draft: ManifestDraft, *, durable: bool) -> Manifest:
        for _ in range(_ATTEMPTS):
            await self._pointers.check_owner(draft)
            token = uuid.uuid4().hex
            # Hashed while it is sent.
            digest, _sent = await asyncio.gather(asyncio.to_thread(_digest, stored), self._hot.stage(token, stored))
            manifest = await self._publish_staged(token, stored, draft, digest, durable=durable)
            if manifest is not None:
                return manifest
        raise StoreUnavailable(f"Redis lost the publication of {draft.name} step {draft.step} {_ATTEMPTS} times")

    async def _publish_staged(
        self, token: str, stored: CartridgeBytes, draft: ManifestDraft, digest: str, *, durable: bool
    ) -> Manifest | None:
        """None if Redis was emptied meanwhile: all has to be done again."""
        reservation = await self._reserve(draft, digest, durable=durable)
        if (manifest := reservation.committed) is not None:
            await self._pointers.drop_staged(token, len(chunks(stored.header)))
            if durable:
                await self._keep(manifest, stored)
            return manifest
        manifest = Manifest.of(
            draft,
            header=stored.header,
            digest=digest,
            version=reservation.version,
            created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )
        if durable:
            with metrics.STAGE_SECONDS.labels("publish", "durable").time():
                await self._durable.blobs.put(digest, stored)
                manifest = await self._durable.put_manifest(manifest)
        with metrics.STAGE_SECONDS.labels("publish", "commit").time():
            outcome = await self._pointers.commit(
                manifest,
                token,
                durable=durable,
                keep_hot=self._settings.keep_hot,
                event_stream_length=self._settings.event_stream_length,
            )
        if outcome is Commit.DONE:
            metrics.PUBLISHED.labels(str(durable).lower()).inc()
            return manifest
        if durable and outcome is Commit.RESERVATION_LOST:
            # The next attempt gets another number; nothing may find this one when pointers are restored.
            await self._durable.withdraw(manifest.name, manifest.version)
        return None

    async def _reserve(self, draft: ManifestDraft, digest: str, *, durable: bool) -> Reservation:
        async def ask() -> Reservation | None:
            reservation = await self._pointers.reserve(draft, digest, durable=durable)
            while isinstance(reservation, LimitReached):
                limit = await self._durable.raise_limit(draft.name, reservation.counter)
                await self._pointers.raise_limit(draft.name, limit)
                reservation = await self._pointers.reserve(draft, digest, durable=durable)
            return reservation

        return await while_marked(digest, ask)


def _digest(stored: CartridgeBytes) -> str:
    with metrics.STAGE_SECONDS.labels("publish", "hash").time():
        return stored.digest()
