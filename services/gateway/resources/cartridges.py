"""/v1/cartridges: names, versions and tags.

A name may be `tenant/name`: paths that end in `/versions`, `/versions/N`, `/versions/N/file`, `/tags/TAG`, `/rollback`,
`/compare`, `/grants` or `/grants/TENANT` mean those parts of the name before them.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from fastapi import Path as InPath
from pydantic import BaseModel, Field

from foundry.errors import CartridgeNotFound
from foundry.store import Manifest, Reference, check_name, lineage
from foundry.store.paging import cut
from foundry.validation import Checked
from services.gateway.access.names import full_name, full_reference, visible
from services.gateway.access.principal import Principal, PrincipalDep
from services.gateway.access.route import ScopedRoute
from services.gateway.errors import naming
from services.gateway.openapi import failures
from services.gateway.resources.listing import PAGE, After, Limit, Listing, for_each, page_of_names
from services.gateway.state import Gateway, GatewayDep

router = APIRouter(tags=["cartridges"], route_class=ScopedRoute)
Json = dict[str, Any]
Name = Annotated[str, InPath(description="`name` or `tenant/name`.")]


class TagRequest(Checked):
    version: int


class RollbackRequest(Checked):
    to: str
    """Which version: its number, a tag or a digest; the name may stand before it."""


class MeasuredVersion(BaseModel):
    """What is known of a version."""

    version: int
    digest: str
    run: str
    step: int
    tokens_seen: int
    objective: str
    document: str | None
    created_at: str
    metrics: dict[str, float]


class VersionComparison(BaseModel):
    object: Literal["cartridge.comparison"] = "cartridge.comparison"
    name: str
    before: MeasuredVersion = Field(serialization_alias="from")
    after: MeasuredVersion = Field(serialization_alias="to")
    changes: dict[str, float]
    """Of each metric that both have, such as `heldout_kl`: that of `to` minus that of `from`."""

    steps: int
    """Optimiser steps of `to` beyond those of `from`."""

    tokens_seen: int
    """Tokens trained on, likewise."""


class CartridgeList(Listing):
    data: list[Json]


@router.get("/v1/cartridges")
async def cartridges(
    gateway: GatewayDep, principal: PrincipalDep, limit: Limit = PAGE, after: After = ""
) -> CartridgeList:
    """Names in order, each with its newest version and its tags."""
    names, next_after = page_of_names(visible(principal, await gateway.store.names()), after, limit)
    data = await for_each(names, lambda name: _summary(gateway, Reference.parse(name)))
    return CartridgeList(data=data, has_more=next_after is not None, last_id=next_after)


@router.get("/v1/cartridges/{name:path}/versions", responses=failures(404))
async def versions(
    name: Name, gateway: GatewayDep, principal: PrincipalDep, limit: Limit = PAGE, after: After = ""
) -> CartridgeList:
    """Versions by number, the oldest first."""
    name = full_name(principal, name)
    manifests = {str(manifest.version): manifest for manifest in await gateway.store.versions(name)}
    if not manifests:
        raise CartridgeNotFound(f"there is no cartridge {name}", field="name")
    durable = await gateway.store.durable_versions(name)
    numbers, next_after = cut(list(manifests), after, limit)
    data = [version_card(manifests[number]) | {"durable": manifests[number].version in durable} for number in numbers]
    return CartridgeList(data=data, has_more=next_after is not None, last_id=next_after)


@router.delete("/v1/cartridges/{name:path}/versions/{version}", status_code=204, responses=failures(404, 409))
async def deleteversion_card(name: Name, version: int, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """Refused with 409 for a version that `latest` or a tag means."""
    missing = CartridgeNotFound(f"there is no cartridge {name}@{version}", field="name")
    await gateway.store.delete(full_name(principal, name, missing=missing), version)
    return Response(status_code=204)


@router.put("/v1/cartridges/{name:path}/tags/{tag}", responses=failures(404, 507))
async def put_tag(name: Name, tag: str, asked: TagRequest, gateway: GatewayDep, principal: PrincipalDep) -> Json:
    """Point a tag at a version, which becomes durable. `previous` is what it meant before."""
    missing = CartridgeNotFound(f"there is no cartridge {name}@{asked.version}", field="version")
    name = full_name(principal, name, missing=missing)
    previous = await gateway.store.tag(name, tag, asked.version)
    return _tag(name, tag, asked.version, previous=previous)


@router.get("/v1/cartridges/{name:path}/tags/{tag}", responses=failures(404))
async def get_tag(name: Name, tag: str, gateway: GatewayDep, principal: PrincipalDep) -> Json:
    """What a tag means and, newest first, what it meant before."""
    name = full_name(principal, name, missing=_no_tag(name, tag))
    record = await gateway.store.tag_record(name, tag)
    return _tag(name, tag, record.version, history=list(record.history))


@router.post("/v1/cartridges/{name:path}/tags/{tag}/rollback", responses=failures(404, 409, 507))
async def rollback_tag(name: Name, tag: str, gateway: GatewayDep, principal: PrincipalDep) -> Json:
    """Let a tag mean what it meant before. 409 if there is no version left that it meant before."""
    name = full_name(principal, name, missing=_no_tag(name, tag))
    version, previous = await gateway.store.rollback_tag(name, tag)
    return _tag(name, tag, version, previous=previous)


@router.delete("/v1/cartridges/{name:path}/tags/{tag}", status_code=204, responses=failures(404, 507))
async def delete_tag(name: Name, tag: str, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    await gateway.store.untag(full_name(principal, name, missing=_no_tag(name, tag)), tag)
    return Response(status_code=204)


@router.get("/v1/cartridges/{name:path}/compare", responses=failures(404))
async def compare(
    name: Name,
    first: Annotated[str, Query(alias="from", max_length=256, description="A version's number, a tag or a digest.")],
    second: Annotated[str, Query(alias="to", max_length=256, description="The same.")],
    gateway: GatewayDep,
    principal: PrincipalDep,
) -> VersionComparison:
    """What was measured of two versions, from their manifests, and how it differs: `to` minus `from`, of what both
    have."""
    before = await _chosen(gateway, principal, name, first, "from")
    after = await _chosen(gateway, principal, name, second, "to")
    shared = before.metrics.keys() & after.metrics.keys()
    return VersionComparison(
        name=before.name,
        before=_measured(before),
        after=_measured(after),
        changes={key: after.metrics[key] - before.metrics[key] for key in sorted(shared)},
        steps=after.step - before.step,
        tokens_seen=after.tokens_seen - before.tokens_seen,
    )


@router.post("/v1/cartridges/{name:path}/rollback", responses=failures(404, 409, 507))
async def rollback(name: Name, asked: RollbackRequest, gateway: GatewayDep, principal: PrincipalDep) -> Json:
    """Publish the bytes of an older version as a new one: `latest` only goes forward. 409 while a run publishes it."""
    missing = CartridgeNotFound(f"there is no cartridge {name}@{asked.to}", field="to")
    whole = full_name(principal, name, missing=missing)
    selector = asked.to.removeprefix(f"{name}@").removeprefix(f"{whole}@")
    with naming("to"):
        return version_card(await gateway.store.rollback(whole, Reference.parse(f"{whole}@{selector}", field="to")))


@router.get("/v1/cartridges/{name:path}", responses=failures(404))
async def cartridge(
    name: Annotated[str, InPath(description="Any reference.")], gateway: GatewayDep, principal: PrincipalDep
) -> Json:
    """The version that a reference means now: `name`, `name@17`, `name@latest`, `name@tag`, `name@blake3:HEX`.

    With `lineage` (its parents, the nearest first, the last one without a number where it is not known any more) and
    where its bytes are.
    """
    manifest, summary = await _found(gateway, full_reference(principal, name, field="name", to_query=True))
    store, name = gateway.store, manifest.name
    known, durable, hot = await asyncio.gather(
        store.versions(name), store.durable_versions(name), store.hot_versions(name)
    )
    return summary | {
        "lineage": [asdict(ancestor) for ancestor in lineage(manifest, known)],
        "durable": manifest.version in durable,
        "hot": manifest.version in hot,
    }


@router.delete("/v1/cartridges/{name:path}", status_code=204, responses=failures(404, 409))
async def delete_cartridge(name: Name, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """Delete a name with all its versions, tags and grants. Refused with 409 while a run publishes it."""
    await gateway.store.delete(full_name(principal, name))
    return Response(status_code=204)


async def _chosen(gateway: Gateway, principal: Principal, name: str, selector: str, param: str) -> Manifest:
    """What `selector` means among the name's versions. Errors name `param`."""
    reference = full_reference(principal, f"{check_name(name)}@{selector}", field=param, to_query=True)
    with naming(param):
        found = await gateway.store.resolve(reference)
        return await gateway.store.manifest(found.name, found.version)


def _measured(manifest: Manifest) -> MeasuredVersion:
    return MeasuredVersion(**{field: getattr(manifest, field) for field in MeasuredVersion.model_fields})


async def _summary(gateway: Gateway, reference: Reference) -> Json:
    return (await _found(gateway, reference))[1]


async def _found(gateway: Gateway, reference: Reference) -> tuple[Manifest, Json]:
    with naming("name"):
        found = await gateway.store.resolve(reference)
    manifest, tags = await asyncio.gather(
        gateway.store.manifest(found.name, found.version), gateway.store.tags(found.name)
    )
    return manifest, {"object": "cartridge", "name": found.name, "tags": tags, "version": version_card(manifest)}


def _no_tag(name: str, tag: str) -> CartridgeNotFound:
    return CartridgeNotFound(f"cartridge {name} has no tag {tag}", field="tag")


def _tag(name: str, tag: str, version: int, **more: Any) -> Json:
    return {"object": "cartridge.tag", "name": name, "tag": tag, "version": version, **more}


def version_card(manifest: Manifest) -> Json:
    return {"object": "cartridge.version", **manifest.model_dump()}
