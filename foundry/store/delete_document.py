"""Deleting a document that no run needs, beside runs that are made meanwhile."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from foundry.errors import Conflict, DigestMismatch, DocumentNotFound

if TYPE_CHECKING:
    from foundry.store.cartridges import CartridgeStore


async def delete_document(store: CartridgeStore, digest: str, tenant: str) -> None:
    """See `CartridgeStore.delete_document`."""
    documents = store.documents.of(tenant)
    await _check_unneeded(store, digest, tenant)
    kept: tuple[str, str] | None = None
    # What is damaged is of no use to a run.
    with suppress(DocumentNotFound, DigestMismatch):
        kept = await documents.get(digest), (await documents.info(digest)).title
    with suppress(DocumentNotFound):
        await documents.delete(digest)
    try:
        # Who makes a run looks at its documents once more behind that: one of the two sees the other.
        await _check_unneeded(store, digest, tenant)
    except Conflict:
        if kept is not None:
            await documents.put(kept[0], title=kept[1])
        raise


async def _check_unneeded(store: CartridgeStore, digest: str, tenant: str) -> None:
    if (run_id := await store.runs.needing(digest, tenant)) is not None:
        raise Conflict(f"run {run_id} needs the document {digest}: cancel it, or wait for its end", field="digest")
