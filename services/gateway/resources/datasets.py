"""/v1/runs/ID/dataset: what a run trained on, shard after shard."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel

from foundry.errors import InvalidArgument, NotFound
from foundry.identity import check_digest
from foundry.store import RunRecord
from foundry.store.conversations import ConversationRow, parts_of
from foundry.store.unreadable import reading
from foundry.v1 import rollout_pb2
from services.gateway.access.principal import PrincipalDep
from services.gateway.access.route import ScopedRoute
from services.gateway.openapi import failures
from services.gateway.resources.listing import After, Listing
from services.gateway.state import Gateway, GatewayDep

router = APIRouter(tags=["runs"], route_class=ScopedRoute)

_AFTER = re.compile(r"([a-z-]{1,32})-([0-9]{6,15})")
# Of one shard's answers, asked for their text at one time.
_MAX_CALLS = 8


class DatasetCard(BaseModel):
    """What a run's data set is named by, what its content hashes to, and how much of each family is in it."""

    object: Literal["dataset"] = "dataset"
    dataset: str
    digest: str
    model_fingerprint: str
    """Whose tokens its ids are; empty where its trainer did not say so."""

    families: dict[str, dict[str, float]]
    parts: list[str]
    """What its shards are of, in the order of its rows; some may have none."""


class DatasetRow(ConversationRow):
    part: str
    """`heldout`, `asked` (for the policy to answer), a family that was written, `general`, `general-heldout`."""

    answer: str | None
    """The text of `answer_ids`; null where nobody answered, or the text was not asked for."""


class DatasetRows(Listing):
    data: list[DatasetRow]


async def _own_run(run_id: str, gateway: GatewayDep, principal: PrincipalDep) -> RunRecord:
    """Raises RunNotFound, for another tenant's too."""
    return await gateway.store.runs.get(run_id, tenant=principal.tenant)


OwnRun = Annotated[RunRecord, Depends(_own_run)]


@router.get("/v1/runs/{run_id}/dataset", responses=failures(404))
async def run_dataset(run: OwnRun, gateway: GatewayDep) -> DatasetCard:
    """404 until it is written as a whole, and once `gc` has taken it."""
    return await _dataset_of(run, gateway)


@router.get("/v1/runs/{run_id}/dataset/rows", responses=failures(404, 409, 504))
async def run_dataset_rows(
    run: OwnRun,
    gateway: GatewayDep,
    after: After = "",
    text: Annotated[bool, Query(description="Add the text of answers, which the model that is served must write.")] = (
        True
    ),
) -> DatasetRows:
    """A shard of it: some tens of conversations. Of what the policy answers itself only what it was asked is kept."""
    card = await _dataset_of(run, gateway)
    stored = gateway.store.datasets.of(run.tenant)
    found = await stored.following(card.dataset, card.parts, _place(after))
    if found is None:
        return DatasetRows(data=[], has_more=False, last_id=None)
    part, number, values = found
    with reading(f"shard {number} of {part} of data set {card.dataset}"):
        rows = [ConversationRow.model_validate(each) for each in values]
    answers: list[str | None] = [None] * len(rows)
    if text and card.model_fingerprint:
        answers = await _texts(rows, card.model_fingerprint, gateway)
    data = [DatasetRow(**dict(row), part=part, answer=answer) for row, answer in zip(rows, answers, strict=True)]
    return DatasetRows(data=data, has_more=True, last_id=f"{part}-{number:06d}")


async def _dataset_of(run: RunRecord, gateway: Gateway) -> DatasetCard:
    """By what its trainer reported. Raises NotFound."""
    told: dict[str, Any] | None = None
    async with aclosing(gateway.store.runs.events(run.run_id, follow=False)) as events:
        async for _, event in events:
            # The first: whoever takes the run up later goes on with the same, or fails.
            if event.get("type") == "dataset":
                told = event
                break
    if told is None:
        raise NotFound(
            f"run {run.run_id} has no data set: it is not written yet, or its events are not kept any more",
            field="run_id",
        )
    with reading(f"the event of run {run.run_id} about its data set"):
        dataset = check_digest(told["dataset"])
        fingerprint = str(told.get("model_fingerprint") or run.spec.model_fingerprint)
    try:
        summary = await gateway.store.datasets.of(run.tenant).summary(dataset)
    except NotFound as error:
        raise NotFound(f"the data set of run {run.run_id} is not kept any more", field="run_id") from error
    return DatasetCard(
        dataset=dataset,
        digest=summary.digest,
        model_fingerprint=fingerprint,
        families={family: dict(counts) for family, counts in summary.families.items()},
        parts=list(parts_of(run.spec.families)),
    )


def _place(after: str) -> tuple[str, int] | None:
    """The shard that a page ended with. Raises InvalidArgument."""
    if not after:
        return None
    if (found := _AFTER.fullmatch(after)) is None:
        raise InvalidArgument(f"{after[:100]!r} is not the `last_id` of a page", field="after")
    return found[1], int(found[2])


async def _texts(rows: list[ConversationRow], fingerprint: str, gateway: Gateway) -> list[str | None]:
    """As the model that is served writes them. Raises FingerprintMismatch if it is another one, Unavailable."""
    deadline = time.monotonic() + gateway.settings.request_timeout_seconds
    places = asyncio.Semaphore(_MAX_CALLS)

    async def text(row: ConversationRow) -> str | None:
        if not row.author:
            return None
        request = rollout_pb2.DetokenizeRequest(
            model_fingerprint=fingerprint, ids=row.answer_ids, omit_special_tokens=True
        )
        async with places:
            answer = await gateway.rollouts.ask(
                lambda stub, seconds: stub.Detokenize(request, timeout=seconds), deadline=deadline
            )
        return answer.text

    return await asyncio.gather(*map(text, rows))
