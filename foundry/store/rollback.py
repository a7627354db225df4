"""Rolling `latest` back: it only goes forward, so the old bytes become a new version."""

from __future__ import annotations

import uuid
from contextlib import suppress
from typing import TYPE_CHECKING

from foundry.errors import Conflict, Fenced, InvalidArgument, StoreUnavailable
from foundry.store.manifest import Manifest, ManifestDraft
from foundry.store.names import Reference, check_name

if TYPE_CHECKING:
    from foundry.store.cartridges import CartridgeStore

# Longer than it takes to copy a cartridge.
_HOLD_SECONDS = 600.0


async def rollback(store: CartridgeStore, name: str, to: Reference) -> Manifest:
    """See `CartridgeStore.rollback`."""
    if to.name != check_name(name):
        raise InvalidArgument(f"{to} is no version of {name}", field="to")
    run = f"rollback-{uuid.uuid4().hex[:8]}"
    # With an end, because nobody takes over from a process that dies in it.
    await store.acquire(name, run, 1, hold_seconds=_HOLD_SECONDS)
    try:
        old, latest = await store.resolve(to), await store.resolve(name)
        if old.digest == latest.digest:
            raise Conflict(f"{latest} has the bytes of {to} already", field="to")
        async with store.leased(old.digest, run, _HOLD_SECONDS):
            manifest = await store.manifest(name, old.version)
            draft = ManifestDraft(
                name=name,
                run=run,
                attempt=1,
                step=manifest.step,
                parent=latest.digest,
                document=manifest.document,
                init=f"rollback of {old}",
                objective=manifest.objective,
                tokens_seen=manifest.tokens_seen,
                metrics=manifest.metrics,
            )
            return await store.publish(await store.fetch(old.digest), draft, durable=True)
    finally:
        # Not released, it ends by itself; taken over, it is over.
        with suppress(Fenced, StoreUnavailable):
            await store.release(name, run, 1)
