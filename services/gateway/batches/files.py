"""/v1/files: what batches read, and what they answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.datastructures import UploadFile

from foundry.errors import InvalidArgument, ResourceExhausted
from foundry.store import FileInfo, FileStore
from services.gateway.access.principal import Principal, PrincipalDep
from services.gateway.access.route import ScopedRoute
from services.gateway.errors import UnsupportedMediaType
from services.gateway.media_type import MediaType
from services.gateway.openapi import failures
from services.gateway.resources.listing import Listing
from services.gateway.state import Gateway, GatewayDep

router = APIRouter(tags=["OpenAI"], route_class=ScopedRoute)
_STRIDE_BYTES = 256 * 1024
_MIN_KEEP_SECONDS, _MAX_KEEP_SECONDS = 3600, 2_592_000
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"const": "batch"},
                        "expires_after[anchor]": {"const": "created_at"},
                        "expires_after[seconds]": {"type": "integer"},
                    },
                }
            }
        },
    }
}
FilesLimit = Annotated[int, Query(ge=1, le=10_000, description="Most entries of the page.")]
Order = Annotated[Literal["asc", "desc"], Query(description="By the time of creation.")]


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"

    @classmethod
    def of(cls, info: FileInfo) -> FileObject:
        return cls(
            id=info.file_id,
            bytes=info.num_bytes,
            created_at=info.created_at,
            expires_at=info.expires_at,
            filename=info.filename,
            purpose=info.purpose,
        )


class FileList(Listing):
    data: list[FileObject]


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


@router.post("/v1/files", openapi_extra=_BODY, responses=failures(413, 415, 507))
async def upload_file(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> FileObject:
    """Keep a file of requests for a batch (`purpose` batch), by default for 30 days."""
    if MediaType.of(request.headers.get("content-type", "")).name != "multipart/form-data":
        raise UnsupportedMediaType("send a file as multipart/form-data, with the fields file and purpose")
    async with request.form(max_files=1, max_fields=8, max_part_size=_STRIDE_BYTES) as form:
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise InvalidArgument("file is missing", field="file")
        if purpose != "batch":
            raise InvalidArgument("purpose must be batch: files are for batches only", field="purpose")
        keep_seconds = _keep_seconds(form.get("expires_after[seconds]"), gateway)
        store = of(principal, gateway)
        if len(await store.list()) >= gateway.settings.batches.max_files:
            raise ResourceExhausted(f"{gateway.settings.batches.max_files} files are kept: delete some")
        async with gateway.uploading:
            content = await file.read()
            with gateway.quotas.storing(principal, len(content)):
                filename = (file.filename or "")[:256].encode(errors="replace").decode()
                info = await store.put(content, filename=filename, purpose=purpose, keep_seconds=keep_seconds)
    return FileObject.of(info)


@router.get("/v1/files")
async def files(
    gateway: GatewayDep,
    principal: PrincipalDep,
    limit: FilesLimit = 10_000,
    after: str = "",
    order: Order = "desc",
    purpose: str | None = None,
) -> FileList:
    """Those that are kept."""
    store = of(principal, gateway)
    page = await store.page(after=after, limit=limit, purpose=purpose, oldest_first=order == "asc")
    return FileList(
        data=[FileObject.of(info) for info in page.items],
        has_more=page.next_after is not None,
        last_id=page.next_after,
    )


@router.get("/v1/files/{file_id}", responses=failures(404))
async def file(file_id: str, gateway: GatewayDep, principal: PrincipalDep) -> FileObject:
    return FileObject.of(await of(principal, gateway).info(file_id))


@router.get("/v1/files/{file_id}/content", response_class=StreamingResponse, responses=failures(404))
async def file_content(file_id: str, gateway: GatewayDep, principal: PrincipalDep) -> StreamingResponse:
    """The file's bytes."""
    content = await of(principal, gateway).content(file_id)
    headers = {"content-length": str(content.nbytes)}
    return StreamingResponse(_pieces(content), media_type="application/octet-stream", headers=headers)


@router.delete("/v1/files/{file_id}", responses=failures(404))
async def delete_file(file_id: str, gateway: GatewayDep, principal: PrincipalDep) -> FileDeleted:
    """A batch that is not over and reads it fails."""
    await of(principal, gateway).delete(file_id)
    return FileDeleted(id=file_id)


def of(principal: Principal, gateway: Gateway) -> FileStore:
    """The files that the principal may see."""
    return gateway.store.files.of(principal.tenant or "")


async def _pieces(content: memoryview) -> AsyncIterator[bytes]:
    for begin in range(0, content.nbytes, _STRIDE_BYTES):
        yield bytes(content[begin : begin + _STRIDE_BYTES])


def _keep_seconds(text: Any, gateway: Gateway) -> int:
    if text is None:
        return gateway.settings.batches.keep_seconds
    if not (isinstance(text, str) and text.isdecimal() and len(text) < 9) or not (
        _MIN_KEEP_SECONDS <= int(text) <= _MAX_KEEP_SECONDS
    ):
        raise InvalidArgument(
            f"expires_after.seconds must be within {_MIN_KEEP_SECONDS} and {_MAX_KEEP_SECONDS}",
            field="expires_after.seconds",
        )
    return int(text)
