"""Deleting documents beside runs that need them, also those that are made in the same moment."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from foundry.errors import Conflict, DocumentNotFound
from foundry.store import CartridgeStore, DocumentStore, RunState
from services.gateway.resources.runs import _check_still_there
from tests.store_data import claim, run_spec

TEXT = "The treaty was signed in the spring."


async def kept(store: CartridgeStore, tenant: str = "") -> str:
    return await store.documents.of(tenant).put(TEXT, title="The treaty")


@pytest.mark.storages("file", "s3")
async def test_a_document_stays_until_the_run_is_over(store: CartridgeStore) -> None:
    digest = await kept(store)
    run_id = await store.runs.create(run_spec(document=digest))
    for _ in range(2):
        with pytest.raises(Conflict, match=run_id) as raised:
            await store.delete_document(digest)
        assert raised.value.field == "digest"
        assert await store.documents.get(digest) == TEXT
        await store.runs.request_pause(run_id)
    await store.runs.request_resume(run_id)
    claimed = await claim(store.runs)
    with pytest.raises(Conflict):
        await store.delete_document(digest)
    await store.runs.finish(run_id, claimed.attempt, RunState.SUCCEEDED)
    for _ in range(2):
        await store.delete_document(digest)
        with pytest.raises(DocumentNotFound):
            await store.documents.get(digest)


async def test_another_tenants_run_needs_its_own(store: CartridgeStore) -> None:
    digest = await kept(store, "acme")
    assert await kept(store) == digest
    await store.runs.create(run_spec("acme/report", document=digest), tenant="acme")
    await store.delete_document(digest)
    with pytest.raises(Conflict):
        await store.delete_document(digest, tenant="acme")
    assert await store.documents.of("acme").get(digest) == TEXT


async def test_a_run_that_is_made_meanwhile_has_its_document(
    store: CartridgeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await kept(store)
    delete = DocumentStore.delete

    async def run_comes_first(self: DocumentStore, digest: str) -> None:
        await store.runs.create(run_spec(document=digest))
        await delete(self, digest)

    monkeypatch.setattr(DocumentStore, "delete", run_comes_first)
    with pytest.raises(Conflict):
        await store.delete_document(digest)
    assert await store.documents.get(digest) == TEXT
    assert (await store.documents.info(digest)).title == "The treaty"


async def test_a_run_whose_document_went_meanwhile_is_cancelled(store: CartridgeStore) -> None:
    digest = await kept(store)
    spec = run_spec(document=digest)
    await store.delete_document(digest)
    run_id = await store.runs.create(spec)
    gateway = cast(Any, SimpleNamespace(store=store))
    with pytest.raises(DocumentNotFound):
        await _check_still_there(run_id, spec, store.documents, gateway)
    assert (await store.runs.get(run_id)).state is RunState.CANCELLED
