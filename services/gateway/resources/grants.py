"""/v1/cartridges/NAME/grants: other tenants that may query a cartridge."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Response
from fastapi import Path as InPath

from foundry.errors import CartridgeNotFound, GrantNotFound
from foundry.store import Grant
from services.gateway.access.names import full_name
from services.gateway.access.principal import PrincipalDep
from services.gateway.access.route import ScopedRoute
from services.gateway.openapi import failures
from services.gateway.resources.listing import PAGE, After, Limit, Listing
from services.gateway.state import GatewayDep

router = APIRouter(tags=["cartridges"], route_class=ScopedRoute)
Json = dict[str, Any]
Name = Annotated[str, InPath(description="`name` or `tenant/name`.")]


class GrantList(Listing):
    data: list[Json]


@router.get("/v1/cartridges/{name:path}/grants", responses=failures(404))
async def grants(
    name: Name, gateway: GatewayDep, principal: PrincipalDep, limit: Limit = PAGE, after: After = ""
) -> GrantList:
    """By tenant."""
    name = full_name(principal, name)
    page = await gateway.store.grants.page(name, after=after, limit=limit)
    if not page.items and name not in await gateway.store.names():
        raise CartridgeNotFound(f"there is no cartridge {name}", field="name")
    return GrantList(
        data=[_grant(grant) for grant in page.items], has_more=page.next_after is not None, last_id=page.next_after
    )


@router.put("/v1/cartridges/{name:path}/grants/{tenant}", responses=failures(404, 507))
async def put_grant(name: Name, tenant: str, gateway: GatewayDep, principal: PrincipalDep) -> Json:
    """Let another tenant query a cartridge, and nothing else. Gateways know it within `api_keys_refresh_seconds`."""
    name = full_name(principal, name)
    if name not in await gateway.store.names():
        raise CartridgeNotFound(f"there is no cartridge {name}", field="name")
    return _grant(await gateway.store.grants.put(name, tenant))


@router.delete("/v1/cartridges/{name:path}/grants/{tenant}", status_code=204, responses=failures(404))
async def delete_grant(name: Name, tenant: str, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """Gateways know it within `api_keys_refresh_seconds`."""
    missing = GrantNotFound(f"{name} is not granted to {tenant}", field="tenant")
    await gateway.store.grants.delete(full_name(principal, name, missing=missing), tenant)
    return Response(status_code=204)


def _grant(grant: Grant) -> Json:
    return {"object": "cartridge.grant", **grant.model_dump()}
