"""/v1/runs: queue training runs, watch them, stop them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Literal

import structlog
from fastapi import APIRouter, Body, Depends, Header, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from foundry.errors import (
    CartridgeTooLong,
    DeadlineExceeded,
    DocumentNotFound,
    FingerprintMismatch,
    FoundryError,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from foundry.recipes import choose, describe
from foundry.rpc.pods import Pods
from foundry.rpc.teacher import TeacherClient
from foundry.selfstudy.prompts import read_prompts
from foundry.store import DocumentPrompts, DocumentStore, RunRecord, RunRequest, RunSpec, check_new_name
from foundry.v1 import common_pb2
from services.gateway.access.names import full_name, full_text
from services.gateway.access.principal import Principal, PrincipalDep
from services.gateway.access.route import ScopedRoute
from services.gateway.balancer import ServedModel
from services.gateway.base_name import check_free
from services.gateway.errors import NothingMore, naming
from services.gateway.openapi import failures
from services.gateway.resources import documents
from services.gateway.resources.listing import PAGE, After, Limit, Listing
from services.gateway.state import Gateway, GatewayDep

log = structlog.get_logger(__name__)
router = APIRouter(tags=["runs"], route_class=ScopedRoute)

_TEACHER_TIMEOUT_SECONDS = 60.0

_EVENT_ID = re.compile(r"([0-9]{1,20})(?:-([0-9]{1,20}))?")
_EXAMPLE = {"name": "handbook", "document": "blake3:…", "recipe": "quick"}


class RunCard(RunRecord):
    object: Literal["run"] = "run"

    job: str | None = None
    """The run's Kubernetes Job, if there is one now."""

    chosen: list[str] | None = None
    """What was chosen for the run and why, for people to read; said when it is made."""


class RunList(Listing):
    data: list[RunCard]


async def _own_run(run_id: str, gateway: GatewayDep, principal: PrincipalDep) -> str:
    """Raises RunNotFound, for another tenant's too."""
    await gateway.store.runs.get(run_id, tenant=principal.tenant)
    return run_id


OwnRun = Annotated[str, Depends(_own_run)]


@router.post("/v1/runs", status_code=201, responses=failures(404, 409, 507))
async def create_run(
    asked: Annotated[RunRequest, Body(openapi_examples={"selfstudy": {"value": _EXAMPLE}})],
    gateway: GatewayDep,
    principal: PrincipalDep,
) -> RunCard:
    """Queue a run for a stored `document` (a digest), or for a `text` (and `title`) that is stored with it.

    What is not given follows from the recipe and the document's length. What can be known now is checked now: every
    value, the documents, the model, and how long the document is.
    """
    asked = await _with_full_names(asked, gateway, principal)
    text = asked.text
    model = _served_model(gateway)
    if model is not None:
        check_free(model.name, asked.name)
    await gateway.quotas.check_runs(principal)
    gateway.quotas.check_stored(principal)
    if "num_steps" in asked.model_fields_set:
        gateway.quotas.check_steps(principal, asked.num_steps)
    _check_resources(asked, gateway)
    await _check_texts(asked, documents.of(principal, gateway))
    texts = await _document_texts(asked, documents.of(principal, gateway))
    num_tokens = None
    if model is not None and gateway.teachers is not None:
        num_tokens = await _context_tokens(texts, model, gateway.teachers, principal.caller(""))
    spec = choose(asked, num_tokens)
    gateway.quotas.check_steps(principal, spec.num_steps)
    if model is not None:
        _check_model(spec, model)
        if num_tokens is not None and spec.num_tokens > num_tokens:
            raise CartridgeTooLong(
                f"a cartridge of {spec.num_tokens} tokens was asked for, but the document has only {num_tokens} "
                "with its template",
                field="num_tokens",
            )
    if text is not None:
        await documents.put(gateway, principal, text, asked.title or "")
    run_id = await gateway.quotas.create_run(principal, spec)
    await _check_still_there(run_id, spec, documents.of(principal, gateway), gateway)
    structlog.contextvars.bind_contextvars(run_id=run_id)
    _look_at_jobs(gateway)
    card = await _card_of(run_id, gateway)
    if num_tokens is None:
        return card
    return card.model_copy(update={"chosen": describe(spec, asked.recipe, num_tokens)})


@router.get("/v1/runs")
async def runs(gateway: GatewayDep, principal: PrincipalDep, limit: Limit = PAGE, after: After = "") -> RunList:
    """Newest first."""
    page = await gateway.store.runs.page(after=after, limit=limit, tenant=principal.tenant)
    data = [_card(record, gateway) for record in page.items]
    return RunList(data=data, has_more=page.next_after is not None, last_id=page.next_after)


@router.get("/v1/runs/{run_id}", responses=failures(404))
async def run(run_id: OwnRun, gateway: GatewayDep) -> RunCard:
    return await _card_of(run_id, gateway)


@router.post("/v1/runs/{run_id}/cancel", responses=failures(404, 409, 507))
async def cancel_run(run_id: OwnRun, gateway: GatewayDep) -> RunCard:
    """The worker ends the run after the step in hand; a run that waits ends now."""
    await gateway.store.runs.request_cancel(run_id)
    _look_at_jobs(gateway)
    return await _card_of(run_id, gateway)


@router.post("/v1/runs/{run_id}/pause", responses=failures(404, 409, 507))
async def pause_run(run_id: OwnRun, gateway: GatewayDep) -> RunCard:
    await gateway.store.runs.request_pause(run_id)
    return await _card_of(run_id, gateway)


@router.post("/v1/runs/{run_id}/resume", responses=failures(404, 409, 507))
async def resume_run(run_id: OwnRun, gateway: GatewayDep) -> RunCard:
    await gateway.store.runs.request_resume(run_id)
    _look_at_jobs(gateway)
    return await _card_of(run_id, gateway)


@router.delete("/v1/runs/{run_id}", status_code=204, responses=failures(404, 409))
async def delete_run(run_id: str, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """Delete a run with its events and checkpoints. Its versions stay. Refused with 409 unless it is over."""
    await gateway.store.runs.delete(run_id, tenant=principal.tenant)
    return Response(status_code=204)


async def _position(run_id: OwnRun, gateway: GatewayDep, last_event_id: Annotated[str | None, Header()] = None) -> str:
    """Where an event stream begins. A dependency, since the stream's status is sent before its first event."""
    after = last_event_id or "0-0"
    found = _EVENT_ID.fullmatch(after)
    # Redis has no larger numbers in its ids.
    if found is None or any(int(part or 0) >= 2**64 for part in found.groups()):
        raise InvalidArgument(f"{after[:100]!r} is not an event id", field="last-event-id")
    if await gateway.store.runs.nothing_after(run_id, after):
        # Which by the standard ends the reconnecting (https://html.spec.whatwg.org/multipage/server-sent-events.html).
        raise NothingMore
    return after


@router.get(
    "/v1/runs/{run_id}/events",
    response_class=EventSourceResponse,
    responses=failures(404) | {204: {"description": "Nothing follows."}},
)
async def run_events(
    run_id: str, after: Annotated[str, Depends(_position)], gateway: GatewayDep, follow: bool = True
) -> AsyncIterator[ServerSentEvent]:
    """What happened and happens, as server-sent events with ids; ends after the one of type `finished`; with
    `follow=false` after the newest.

    A comment is sent every 15 s of silence. A stream that ends earlier is to be asked for again with `Last-Event-ID`;
    204 if nothing comes after that.
    """
    try:
        async for event_id, event in gateway.store.runs.events(run_id, after, follow=follow):
            yield ServerSentEvent(id=event_id, data=event)
    except FoundryError as error:
        log.warning("event stream cut short", run_id=run_id, reason=error.reason, error=error.message)


async def _with_full_names(asked: RunRequest, gateway: Gateway, principal: Principal) -> RunRequest:
    foreign = PermissionDenied(
        f"{asked.name} would be another tenant's than this key's: leave out what stands before the slash", field="name"
    )
    changes = {"name": check_new_name(full_name(principal, asked.name, missing=foreign))}
    if asked.init_version:
        changes["init_version"] = full_text(principal, asked.init_version, field="init_version")
        with naming("init_version"):
            await gateway.store.resolve(changes["init_version"])
    return asked.model_copy(update=changes)


def _served_model(gateway: Gateway) -> ServedModel | None:
    try:
        return gateway.rollouts.model()
    except Unavailable:
        # Then the run waits for a rollout server, and its trainer checks.
        return None


async def _document_texts(asked: RunRequest, stored: DocumentStore) -> list[tuple[str, str]]:
    """All documents of the run, each behind the parameter that it came by."""
    first = "document" if asked.text is None else "text"
    texts = [(first, asked.text)] if asked.text is not None else []
    for digest in asked.documents[len(texts) :]:
        field = "more_documents" if texts else first
        texts.append((field, await _text(stored, digest, field)))
    return texts


async def _context_tokens(
    documents: Sequence[tuple[str, str]], model: ServedModel, teachers: Pods, caller: common_pb2.Caller
) -> int | None:
    """Tokens of the documents with their template; None if the teacher can't say now.

    Has the teacher compute the documents' KV, which the run needs first of all, where the trainer will ask for it.
    """
    num_tokens = 0
    for field, document in documents:
        teacher = TeacherClient(
            teachers, model.fingerprint, document, timeout_seconds=_TEACHER_TIMEOUT_SECONDS, caller=caller
        )
        try:
            num_tokens += await teacher.put_context()
        except (Unavailable, DeadlineExceeded, ResourceExhausted, Unauthenticated, PermissionDenied) as error:
            log.warning("document not measured", error=error.message)
            return None
        except InvalidArgument as error:
            if error.field == "document":
                error.field = field
            raise
    return num_tokens


def _check_model(spec: RunSpec, model: ServedModel) -> None:
    if spec.model_fingerprint not in ("", model.fingerprint):
        raise FingerprintMismatch(
            f"the run is for model {spec.model_fingerprint}, {model.name} is {model.fingerprint}",
            field="model_fingerprint",
        )
    if spec.max_new_tokens >= model.max_sequence_tokens:
        raise InvalidArgument(
            f"max_new_tokens {spec.max_new_tokens} leaves no room for a prompt: the rollout servers of {model.name} "
            f"take {model.max_sequence_tokens} tokens in all",
            field="max_new_tokens",
        )


async def _check_texts(spec: RunSpec, stored: DocumentStore) -> None:
    """Those besides the documents: what the start is made of, and files of prompts."""
    if spec.init_text:
        await _text(stored, spec.init_text, "init_text")
    for name in ("prompts", "heldout"):
        if isinstance(prompts := getattr(spec, name), DocumentPrompts):
            text = await _text(stored, prompts.digest, f"{name}.digest")
            await asyncio.to_thread(read_prompts, text, field=name)


async def _check_still_there(run_id: str, spec: RunSpec, stored: DocumentStore, gateway: Gateway) -> None:
    """Whoever deleted a document before the run was there did not know of it."""
    try:
        await asyncio.gather(*map(stored.info, spec.texts))
    except DocumentNotFound:
        await gateway.store.runs.request_cancel(run_id)
        raise


async def _text(stored: DocumentStore, digest: str, field: str) -> str:
    with naming(field):
        return await stored.get(digest)


def _check_resources(spec: RunSpec, gateway: Gateway) -> None:
    if spec.resources is None:
        return
    if gateway.jobs is None:
        raise InvalidArgument(
            "resources are for runs that get a Kubernetes Job each; here workers train them, with what they have",
            field="resources",
        )
    gateway.jobs.check(spec.resources)


def _look_at_jobs(gateway: Gateway) -> None:
    if gateway.jobs is not None:
        gateway.jobs.wake()


async def _card_of(run_id: str, gateway: Gateway) -> RunCard:
    return _card(await gateway.store.runs.get(run_id), gateway)


def _card(record: RunRecord, gateway: Gateway) -> RunCard:
    return RunCard(**dict(record), job=gateway.jobs.name_of(record.run_id) if gateway.jobs is not None else None)
