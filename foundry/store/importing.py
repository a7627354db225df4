"""Cartridges that no run of ours made."""

from __future__ import annotations

from foundry.identity import CartridgeBytes
from foundry.store.briefly import holding
from foundry.store.cartridges import CartridgeStore
from foundry.store.manifest import Manifest, ManifestDraft


async def import_version(
    store: CartridgeStore, stored: CartridgeBytes, name: str, *, origin: str, document: str | None = None
) -> Manifest:
    """Publish a cartridge as a durable version, `latest` from then on.

    `origin` says in the manifest where it comes from. Raises Conflict while a run holds the name, InvalidArgument for
    one that none may have.
    """
    async with holding(store, name, "import") as run:
        draft = ManifestDraft(name=name, run=run, attempt=1, step=0, document=document, init=f"import of {origin}")
        return await store.publish(stored, draft, durable=True)
