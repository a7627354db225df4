"""/v1/cartridges: names, versions and tags.

A name may be `tenant/name`: paths that end in `/versions`, `/versions/N` or `/tags/TAG` mean those parts of the name
before them.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Response
from fastapi import Path as InPath
from pydantic import BaseModel, ConfigDict

from foundry.errors import CartridgeNotFound
from foundry.store import Manifest, Reference, check_name
from services.gateway.listing import for_each
from services.gateway.state import Gateway, GatewayDep

router = APIRouter(tags=["cartridges"])
Json = dict[str, Any]
Name = Annotated[str, InPath(description="`name` or `tenant/name`.")]


class TagRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: int


@router.get("/v1/cartridges")
async def cartridges(gateway: GatewayDep) -> Json:
    """Every name with its newest version and its tags."""
    data = await for_each(await gateway.store.names(), lambda name: _summary(gateway, name))
    return {"object": "list", "data": data}


@router.get("/v1/cartridges/{name:path}/versions")
async def versions(name: Name, gateway: GatewayDep) -> Json:
    """All versions, oldest first."""
    manifests = await gateway.store.versions(name)
    if not manifests:
        raise CartridgeNotFound(f"there is no cartridge {name}", field="name")
    durable = await gateway.store.durable_versions(name)
    data = [_version(manifest) | {"durable": manifest.version in durable} for manifest in manifests]
    return {"object": "list", "data": data}


@router.delete("/v1/cartridges/{name:path}/versions/{version}", status_code=204)
async def delete_version(name: Name, version: int, gateway: GatewayDep) -> Response:
    """Refused with 409 for a version that `latest` or a tag means."""
    await gateway.store.delete(name, version)
    return Response(status_code=204)


@router.put("/v1/cartridges/{name:path}/tags/{tag}")
async def put_tag(name: Name, tag: str, asked: TagRequest, gateway: GatewayDep) -> Json:
    """Point a tag at a version, which becomes durable."""
    check_name(name)
    await gateway.store.tag(name, tag, asked.version)
    return {"object": "cartridge.tag", "name": name, "tag": tag, "version": asked.version}


@router.delete("/v1/cartridges/{name:path}/tags/{tag}", status_code=204)
async def delete_tag(name: Name, tag: str, gateway: GatewayDep) -> Response:
    await gateway.store.untag(name, tag)
    return Response(status_code=204)


@router.get("/v1/cartridges/{reference:path}")
async def cartridge(reference: str, gateway: GatewayDep) -> Json:
    """The version that a reference means now: `name`, `name@17`, `name@latest`, `name@tag`, `name@blake3:HEX`."""
    return await _summary(gateway, reference)


@router.delete("/v1/cartridges/{name:path}", status_code=204)
async def delete_cartridge(name: Name, gateway: GatewayDep) -> Response:
    """Delete a name with all its versions and tags. Refused with 409 while a run publishes it."""
    await gateway.store.delete(name)
    return Response(status_code=204)


async def _summary(gateway: Gateway, reference: str) -> Json:
    try:
        found = await gateway.store.resolve(Reference.parse(reference, field="reference"))
    except CartridgeNotFound as error:
        error.field = "reference"
        raise
    manifest, tags = await asyncio.gather(
        gateway.store.manifest(found.name, found.version), gateway.store.tags(found.name)
    )
    return {"object": "cartridge", "name": found.name, "tags": tags, "version": _version(manifest)}


def _version(manifest: Manifest) -> Json:
    return {"object": "cartridge.version", **asdict(manifest)}
