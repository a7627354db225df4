"""Rolling `latest` back: it only goes forward, so the old bytes become a new version."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foundry.errors import Conflict, InvalidArgument
from foundry.store.briefly import HOLD_SECONDS, holding
from foundry.store.manifest import Manifest, ManifestDraft
from foundry.store.names import Reference, check_name

if TYPE_CHECKING:
    from foundry.store.cartridges import CartridgeStore


async def rollback(store: CartridgeStore, name: str, to: Reference) -> Manifest:
    """See `CartridgeStore.rollback`."""
    if to.name != check_name(name):
        raise InvalidArgument(f"{to} is no version of {name}", field="to")
    async with holding(store, name, "rollback") as run:
        old, latest = await store.resolve(to), await store.resolve(name)
        if old.digest == latest.digest:
            raise Conflict(f"{latest} has the bytes of {to} already", field="to")
        async with store.leased(old.digest, run, HOLD_SECONDS):
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
