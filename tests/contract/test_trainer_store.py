"""What an attempt at a run reads and keeps: its tenant's."""

from __future__ import annotations

import pytest

from foundry.errors import DocumentNotFound
from foundry.identity import content_digest
from foundry.rpc.retry import Retry
from foundry.store import CartridgeStore, DatasetSummary
from services.trainer.attempt import Attempt
from tests.store_data import claim, run_spec


@pytest.mark.parametrize(("tenant", "others"), [("", ("acme",)), ("acme", ("", "acm"))])
async def test_an_attempt_has_the_documents_and_data_sets_of_its_tenant(
    store: CartridgeStore, tenant: str, others: tuple[str, ...]
) -> None:
    for other in others:
        await store.documents.of(other).put("another's")
    await store.documents.of(tenant).put("its own")
    await store.runs.create(run_spec("acme/report"), tenant=tenant)
    attempt = Attempt(await claim(store.runs), store, Retry(1.0))
    assert await attempt.document(content_digest(b"its own")) == "its own"
    with pytest.raises(DocumentNotFound):
        await attempt.document(content_digest(b"another's"))

    dataset, rows = content_digest(b"of equal runs"), [{"family": "cloze"}]
    assert await attempt.append_shard(dataset, "cloze", 0, rows) == rows
    await attempt.finish_dataset(dataset, DatasetSummary(digest=dataset, families={}))
    assert await attempt.read_shard(dataset, "cloze", 0) == rows
    assert (await store.datasets.of(tenant).summary(dataset)).digest == dataset
    for other in others:
        assert await store.datasets.of(other).shard(dataset, "cloze", 0) is None
