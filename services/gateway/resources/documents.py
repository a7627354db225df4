"""/v1/documents: the texts that cartridges stand in for, named by their content."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from foundry.errors import DocumentTooLong, DocumentUnreadable, InvalidArgument
from foundry.store import DocumentInfo
from foundry.validation import Checked
from services.gateway.access.route import ScopedRoute
from services.gateway.errors import DocumentTooLarge
from services.gateway.resources.listing import PAGE, After, Limit, Listing
from services.gateway.state import Gateway, GatewayDep

router = APIRouter(tags=["documents"], route_class=ScopedRoute)
Title = Annotated[str, Field(max_length=300)]


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
        },
    }
}


@router.post("/v1/documents", status_code=201, openapi_extra=_BODY)
async def put_document(
    request: Request, gateway: GatewayDep, title: Annotated[Title, Query(description="Of a text/plain body.")] = ""
) -> DocumentCard:
    """Keep a text: JSON {text, title?}, or the text itself as text/plain. The same text again is the same document."""
    if request.headers.get("content-type", "").partition(";")[0].strip() == "application/json":
        asked = DocumentRequest.model_validate(await request.json())
        return await put(gateway, asked.text, asked.title)
    if request.headers.get("content-type", "").startswith("text/plain"):
        return await put(gateway, await request.body(), title)
    raise InvalidArgument("send a document as application/json or as text/plain")


@router.get("/v1/documents")
async def documents(gateway: GatewayDep, limit: Limit = PAGE, after: After = "") -> DocumentList:
    """Oldest first."""
    page = await gateway.store.documents.page(after=after, limit=limit)
    data = [DocumentCard.of(info) for info in page.items]
    return DocumentList(data=data, has_more=page.next_after is not None, last_id=page.next_after)


@router.get("/v1/documents/{digest}")
async def document(digest: str, gateway: GatewayDep) -> DocumentCard:
    return DocumentCard.of(await gateway.store.documents.info(digest))


@router.get("/v1/documents/{digest}/content")
async def document_content(digest: str, gateway: GatewayDep) -> PlainTextResponse:
    return PlainTextResponse(await gateway.store.documents.get(digest))


@router.delete("/v1/documents/{digest}", status_code=204)
async def delete_document(digest: str, gateway: GatewayDep) -> Response:
    """What was trained on it stays; a run that is not over and needs it fails."""
    await gateway.store.documents.delete(digest)
    return Response(status_code=204)


async def put(gateway: Gateway, text: str | bytes, title: str) -> DocumentCard:
    """Store a text that came as the parameter `text`. Raises DocumentUnreadable, DocumentTooLarge."""
    try:
        digest = await gateway.store.documents.put(text, title=title)
    except DocumentTooLong as error:
        raise DocumentTooLarge(error.message, field="text") from error
    except DocumentUnreadable as error:
        raise DocumentUnreadable(error.message, field="text") from error
    return DocumentCard.of(await gateway.store.documents.info(digest))
