"""Cartridges as files: /v1/cartridges/NAME/versions/N/file is sent, /v1/cartridges/NAME/versions takes one."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from foundry.errors import (
    CartridgeNotFound,
    CartridgeUnreadable,
    DigestMismatch,
    FingerprintMismatch,
    InvalidArgument,
    ShapeMismatch,
)
from foundry.identity import CartridgeBytes, check_digest
from foundry.store.importing import import_version
from services.gateway.access.names import full_name
from services.gateway.access.permit import Permit
from services.gateway.access.principal import PrincipalDep
from services.gateway.access.route import ScopedRoute
from services.gateway.base_name import check_free
from services.gateway.errors import UnsupportedMediaType
from services.gateway.media_type import MediaType
from services.gateway.openapi import failures
from services.gateway.resources.cartridges import Json, Name, version_card
from services.gateway.state import GatewayDep

router = APIRouter(tags=["cartridges"], route_class=ScopedRoute)

_MEDIA_TYPE = "application/vnd.safetensors"
_FILE: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {_MEDIA_TYPE: _FILE, "application/octet-stream": _FILE}}
}
Origin = Annotated[
    str, Query(max_length=200, pattern=r"^[ -~]*$", description="Where it comes from, for its manifest.")
]
Document = Annotated[str | None, Query(description="Digest of the document that it stands in for.")]


class SafetensorsResponse(StreamingResponse):
    media_type = _MEDIA_TYPE


@router.get(
    "/v1/cartridges/{name:path}/versions/{version}/file", response_class=SafetensorsResponse, responses=failures(404)
)
async def version_file(
    name: Name, version: int, request: Request, gateway: GatewayDep, principal: PrincipalDep
) -> Response:
    """The version as a safetensors file, whose bytes were checked against its digest (`x-foundry-digest`, `etag`)."""
    missing = CartridgeNotFound(f"there is no cartridge {name}@{version}", field="version")
    manifest = await gateway.store.manifest(full_name(principal, name, missing=missing), version)
    permit: Permit = request.state.permit
    header = await gateway.store.header(manifest.digest)
    num_bytes = len(header.file_prologue()) + header.num_bytes
    permit.held.enter_context(gateway.transferring(num_bytes))
    stored = await gateway.store.fetch(manifest.digest)
    headers = {
        "content-length": str(num_bytes),
        "content-disposition": f'attachment; filename="{manifest.name.replace("/", "-")}-{version}.safetensors"',
        "etag": f'"{manifest.digest}"',
        "x-foundry-digest": manifest.digest,
    }
    return SafetensorsResponse((bytes(part) for part in stored.file_parts()), headers=headers)


@router.post(
    "/v1/cartridges/{name:path}/versions",
    status_code=201,
    openapi_extra=_BODY,
    responses=failures(409, 413, 415, 503, 507),
)
async def upload_version(
    name: Name,
    request: Request,
    gateway: GatewayDep,
    principal: PrincipalDep,
    origin: Origin = "a file",
    document: Document = None,
) -> Json:
    """Take a safetensors file, as `/versions/N/file` sends it, as the name's newest version, durable.

    It must be of the model that is served. Where the header `x-foundry-digest` is sent, its bytes must have that
    digest. 409 while a run publishes the name.
    """
    if MediaType.of(request.headers.get("content-type", "")).name not in (_MEDIA_TYPE, "application/octet-stream"):
        raise UnsupportedMediaType(f"send the file itself, as {_MEDIA_TYPE}")
    model, name = gateway.rollouts.model(), full_name(principal, name)
    check_free(model.name, name)
    # What says no length may become as long as any.
    with gateway.transferring(int(request.headers.get("content-length", gateway.settings.transfer_memory_bytes))):
        # Not collected as a list of pieces first: it is as large as a cartridge.
        content = bytearray()
        async for part in request.stream():
            content += part
        try:
            stored = CartridgeBytes.from_file(content)
        except (InvalidArgument, ShapeMismatch) as error:
            raise CartridgeUnreadable(f"the body is no cartridge: {error.message}", field="body") from error
        if stored.header.model_fingerprint != model.fingerprint:
            raise FingerprintMismatch(
                f"the cartridge is for the model {stored.header.model_fingerprint}, served is {model.fingerprint}"
            )
        if digest := request.headers.get("x-foundry-digest"):
            try:
                await asyncio.to_thread(stored.verify, check_digest(digest, field="x-foundry-digest"))
            except DigestMismatch as error:
                raise CartridgeUnreadable(error.message, field="x-foundry-digest") from error
        with gateway.quotas.storing(principal, stored.header.num_bytes):
            manifest = await import_version(gateway.store, stored, name, origin=origin, document=document)
            return version_card(manifest)
