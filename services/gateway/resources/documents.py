"""/v1/documents: the texts that cartridges stand in for, named by their content."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import structlog
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from foundry.errors import DocumentTooLong, DocumentUnreadable
from foundry.identity import check_digest
from foundry.store import DocumentInfo, DocumentStore
from foundry.store.spec import Title
from services.gateway.access.principal import Principal, PrincipalDep
from services.gateway.access.route import ScopedRoute
from services.gateway.conversion.formats import BY_MEDIA_TYPE
from services.gateway.errors import DocumentTooLarge, naming
from services.gateway.openapi import failures
from services.gateway.resources.listing import PAGE, After, Limit, Listing
from services.gateway.resources.upload import DocumentRequest, FormFields, read_upload
from services.gateway.state import Gateway, GatewayDep

router = APIRouter(tags=["documents"], route_class=ScopedRoute)


class DocumentCard(BaseModel):
    object: Literal["document"] = "document"
    digest: str
    title: str
    num_bytes: int
    created_at: str

    @classmethod
    def of(cls, info: DocumentInfo) -> DocumentCard:
        return cls(**dict(info))


class DocumentList(Listing):
    data: list[DocumentCard]


_FILE = {"type": "string", "format": "binary"}
_FORM = {
    "type": "object",
    "properties": {"file": _FILE, "title": FormFields.model_json_schema()["properties"]["title"]},
    "required": ["file"],
    "additionalProperties": False,
}
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": DocumentRequest.model_json_schema()},
            "multipart/form-data": {"schema": _FORM},
            **{name: {"schema": {"type": "string"}} for name, kind in BY_MEDIA_TYPE.items() if kind == "text"},
            **{name: {"schema": _FILE} for name, kind in BY_MEDIA_TYPE.items() if kind != "text"},
        },
    }
}


@router.post("/v1/documents", status_code=201, openapi_extra=_BODY, responses=failures(413, 415, 507))
async def put_document(
    request: Request,
    gateway: GatewayDep,
    principal: PrincipalDep,
    title: Annotated[Title, Query(description="Of a body that is the document itself.")] = "",
) -> DocumentCard:
    """Keep a text: JSON {text, title?}, or the document itself, or the part `file` of a form, whose name is its title
    unless there is a `title`. The same text again is the same document.

    Text is in UTF-8. Of PDF, HTML and DOCX the text is kept, as Markdown: the digest is the text's.
    """
    gateway.quotas.check_stored(principal)
    sent = await read_upload(request, title)
    text = sent.content
    if sent.kind != "text":
        assert isinstance(text, bytes), "JSON has text alone"
        text = await gateway.converter.markdown(sent.kind, text)
    return await put(gateway, principal, text, sent.title, param=sent.param)


@router.get("/v1/documents")
async def documents(
    gateway: GatewayDep, principal: PrincipalDep, limit: Limit = PAGE, after: After = ""
) -> DocumentList:
    """Oldest first."""
    page = await of(principal, gateway).page(after=after, limit=limit)
    data = [DocumentCard.of(info) for info in page.items]
    return DocumentList(data=data, has_more=page.next_after is not None, last_id=page.next_after)


@router.get("/v1/documents/{digest}", responses=failures(404))
async def document(digest: str, gateway: GatewayDep, principal: PrincipalDep) -> DocumentCard:
    with naming("digest"):
        return DocumentCard.of(await of(principal, gateway).info(digest))


@router.get("/v1/documents/{digest}/content", response_class=PlainTextResponse, responses=failures(404))
async def document_content(digest: str, gateway: GatewayDep, principal: PrincipalDep) -> PlainTextResponse:
    with naming("digest"):
        return PlainTextResponse(await of(principal, gateway).get(digest))


@router.delete("/v1/documents/{digest}", status_code=204, responses=failures(409))
async def delete_document(digest: str, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """What was trained on it stays. Refused with 409 while a run that is not over needs it. Repeated, it is the same: a
    document that is not there is deleted."""
    await gateway.store.delete_document(check_digest(digest), tenant=principal.tenant or "")
    return Response(status_code=204)


def of(principal: Principal, gateway: Gateway) -> DocumentStore:
    """The documents that the principal's runs may use."""
    return gateway.store.documents.of(principal.tenant or "")


async def put(
    gateway: Gateway, principal: Principal, text: str | bytes, title: str, *, param: str = "text"
) -> DocumentCard:
    """Store a text that came as the parameter `param`.

    Raises DocumentUnreadable, DocumentTooLarge, ResourceExhausted beyond the tenant's limit.
    """
    try:
        with gateway.quotas.storing(principal, num_bytes_of(text)):
            digest = await of(principal, gateway).put(text, title=title)
    except DocumentTooLong as error:
        raise DocumentTooLarge(error.message, field=param) from error
    except DocumentUnreadable as error:
        raise DocumentUnreadable(error.message, field=param) from error
    structlog.contextvars.bind_contextvars(document=digest)
    return DocumentCard.of(await of(principal, gateway).info(digest))


def num_bytes_of(text: str | bytes) -> int:
    # What is no text is refused by the store.
    return len(text) if isinstance(text, bytes) else len(text.encode(errors="replace"))
