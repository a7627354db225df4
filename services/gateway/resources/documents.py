"""/v1/documents: the texts that cartridges stand in for, named by their content."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import structlog
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from foundry.errors import DocumentTooLong, DocumentUnreadable
from foundry.store import DocumentInfo, DocumentStore
from foundry.store.spec import Title
from foundry.validation import Checked
from services.gateway.access.principal import Principal, PrincipalDep
from services.gateway.access.route import ScopedRoute
from services.gateway.errors import DocumentTooLarge, UnsupportedMediaType
from services.gateway.media_type import MediaType
from services.gateway.resources.listing import PAGE, After, Limit, Listing
from services.gateway.state import Gateway, GatewayDep

router = APIRouter(tags=["documents"], route_class=ScopedRoute)


class DocumentRequest(Checked):
    text: str
    title: Title = ""


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


_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": DocumentRequest.model_json_schema()},
            "text/plain": {"schema": {"type": "string"}},
            "text/markdown": {"schema": {"type": "string"}},
        },
    }
}


@router.post("/v1/documents", status_code=201, openapi_extra=_BODY)
async def put_document(
    request: Request,
    gateway: GatewayDep,
    principal: PrincipalDep,
    title: Annotated[Title, Query(description="Of a body that is the text itself.")] = "",
) -> DocumentCard:
    """Keep a text: JSON {text, title?}, or the text itself, in UTF-8. The same text again is the same document."""
    gateway.quotas.check_stored(principal)
    sent_as = MediaType.of(request.headers.get("content-type", ""))
    if sent_as.name == "application/json":
        asked = DocumentRequest.model_validate(await request.json())
        return await put(gateway, principal, asked.text, asked.title)
    if sent_as.name in ("text/plain", "text/markdown"):
        return await put(gateway, principal, await request.body(), title)
    raise UnsupportedMediaType("send a document as application/json, text/plain or text/markdown", field="content-type")


@router.get("/v1/documents")
async def documents(
    gateway: GatewayDep, principal: PrincipalDep, limit: Limit = PAGE, after: After = ""
) -> DocumentList:
    """Oldest first."""
    page = await of(principal, gateway).page(after=after, limit=limit)
    data = [DocumentCard.of(info) for info in page.items]
    return DocumentList(data=data, has_more=page.next_after is not None, last_id=page.next_after)


@router.get("/v1/documents/{digest}")
async def document(digest: str, gateway: GatewayDep, principal: PrincipalDep) -> DocumentCard:
    return DocumentCard.of(await of(principal, gateway).info(digest))


@router.get("/v1/documents/{digest}/content")
async def document_content(digest: str, gateway: GatewayDep, principal: PrincipalDep) -> PlainTextResponse:
    return PlainTextResponse(await of(principal, gateway).get(digest))


@router.delete("/v1/documents/{digest}", status_code=204)
async def delete_document(digest: str, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """What was trained on it stays; a run that is not over and needs it fails."""
    await of(principal, gateway).delete(digest)
    return Response(status_code=204)


def of(principal: Principal, gateway: Gateway) -> DocumentStore:
    """The documents that the principal's runs may use."""
    return gateway.store.documents.of(principal.tenant or "")


async def put(gateway: Gateway, principal: Principal, text: str | bytes, title: str) -> DocumentCard:
    """Store a text that came as the parameter `text`.

    Raises DocumentUnreadable, DocumentTooLarge, ResourceExhausted beyond the tenant's limit.
    """
    try:
        with gateway.quotas.storing(principal, num_bytes_of(text)):
            digest = await of(principal, gateway).put(text, title=title)
    except DocumentTooLong as error:
        raise DocumentTooLarge(error.message, field="text") from error
    except DocumentUnreadable as error:
        raise DocumentUnreadable(error.message, field="text") from error
    structlog.contextvars.bind_contextvars(document=digest)
    return DocumentCard.of(await of(principal, gateway).info(digest))


def num_bytes_of(text: str | bytes) -> int:
    # What is no text is refused by the store.
    return len(text) if isinstance(text, bytes) else len(text.encode(errors="replace"))
