"""/v1/batches: many requests, answered when there is room beside those that somebody waits for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from foundry.errors import InvalidArgument, ResourceExhausted
from foundry.store import BatchState, BatchStore
from services.gateway.access.principal import Principal, PrincipalDep
from services.gateway.access.route import ScopedRoute
from services.gateway.batches.files import of as files_of
from services.gateway.openai.requests.parameters import Parameters, Text
from services.gateway.openapi import failures
from services.gateway.resources.listing import Listing
from services.gateway.state import Gateway, GatewayDep

router = APIRouter(tags=["OpenAI"], route_class=ScopedRoute)
Endpoint = Literal[
    "/v1/chat/completions", "/v1/completions", "/v1/cartridge/chat/completions", "/v1/cartridge/completions"
]
BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]


class BatchRequest(Parameters):
    input_file_id: Text
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None


class BatchCounts(BaseModel):
    total: int
    completed: int
    failed: int


class BatchErrors(BaseModel):
    object: Literal["list"] = "list"
    data: list[dict[str, Any]]


class BatchObject(BaseModel):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    metadata: dict[str, str] | None

    @classmethod
    def of(cls, state: BatchState) -> BatchObject:
        record, final = state.record, state.final
        total = state.begun.total if state.begun else 0
        counts = BatchCounts(total=total, completed=state.completed, failed=state.failed)
        if final is not None:
            counts = BatchCounts(total=final.total, completed=final.completed, failed=final.failed)
        ended = {final.status: final.at} if final else {}
        return cls(
            completed_at=ended.get("completed"),
            failed_at=ended.get("failed"),
            expired_at=ended.get("expired"),
            cancelled_at=ended.get("cancelled"),
            id=record.batch_id,
            endpoint=record.endpoint,
            errors=BatchErrors(data=list(final.errors)) if final and final.errors else None,
            input_file_id=record.input_file_id,
            status=_status(state),
            output_file_id=record.output_file_id if final and final.completed else None,
            error_file_id=record.error_file_id if final and final.failed else None,
            created_at=record.created_at,
            in_progress_at=state.begun.at if state.begun else None,
            expires_at=record.expires_at,
            finalizing_at=state.finalizing.at if state.finalizing else None,
            cancelling_at=state.cancel.at if state.cancel else None,
            request_counts=counts,
            metadata=dict(record.metadata) if record.metadata is not None else None,
        )


class BatchList(Listing):
    data: list[BatchObject]


@router.post("/v1/batches", responses=failures(404))
async def create_batch(asked: BatchRequest, gateway: GatewayDep, principal: PrincipalDep) -> BatchObject:
    """Answer the requests of a file, one a line, within a day."""
    info = await files_of(principal, gateway).info(asked.input_file_id)
    if info.purpose != "batch":
        raise InvalidArgument("the file is none of requests: its purpose is not batch", field="input_file_id")
    store = of(principal, gateway)
    if await store.num_open() >= gateway.settings.batches.max_open:
        raise ResourceExhausted(f"{gateway.settings.batches.max_open} batches are not over: wait for one of them")
    record = await store.create(
        client=principal.client,
        endpoint=asked.endpoint,
        input_file_id=asked.input_file_id,
        metadata=asked.metadata,
        seconds=gateway.settings.batches.window_seconds,
    )
    gateway.batch_created.set()
    return BatchObject.of(BatchState(record))


@router.get("/v1/batches")
async def batches(
    gateway: GatewayDep,
    principal: PrincipalDep,
    limit: Annotated[int, Query(ge=1, le=100, description="Most entries of the page.")] = 20,
    after: str = "",
) -> BatchList:
    """Newest first."""
    page = await of(principal, gateway).page(after=after, limit=limit)
    data = [BatchObject.of(state) for state in page.items]
    return BatchList(data=data, has_more=page.next_after is not None, last_id=page.next_after)


@router.get("/v1/batches/{batch_id}", responses=failures(404))
async def batch(batch_id: str, gateway: GatewayDep, principal: PrincipalDep) -> BatchObject:
    """Its files are there when it is over: the answers, and the errors of requests that had none."""
    return BatchObject.of(await of(principal, gateway).get(batch_id))


@router.post("/v1/batches/{batch_id}/cancel", responses=failures(404))
async def cancel_batch(batch_id: str, gateway: GatewayDep, principal: PrincipalDep) -> BatchObject:
    """Begin no more requests. What is answered already is in the output file."""
    store = of(principal, gateway)
    state = await store.get(batch_id)
    if state.final is None:
        await store.cancel(batch_id)
        gateway.batch_created.set()
        state = await store.get(batch_id)
    return BatchObject.of(state)


def of(principal: Principal, gateway: Gateway) -> BatchStore:
    """The batches that the principal may see."""
    return gateway.store.batches.of(principal.tenant or "")


def _status(state: BatchState) -> BatchStatus:
    if state.final is not None:
        return state.final.status
    if state.cancel is not None:
        return "cancelling"
    if state.finalizing is not None:
        return "finalizing"
    return "validating" if state.begun is None else "in_progress"
