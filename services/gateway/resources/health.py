"""/healthz and /readyz, for orchestrators; /health, /ping and /version, for those who know vLLM's."""

from __future__ import annotations

from contextlib import suppress
from importlib import metadata
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from foundry.errors import FoundryError
from services.gateway.openapi import failures
from services.gateway.state import GatewayDep

router = APIRouter(tags=["health"])


@router.get("/health", response_class=Response, responses=failures(409))
async def health(gateway: GatewayDep) -> Response:
    """As vLLM's: 200 without content if a request can be answered, which takes a rollout server."""
    await gateway.check_rollouts()
    return Response()


@router.get("/ping", response_class=Response, responses=failures(409))
async def ping(gateway: GatewayDep) -> Response:
    """The same, by the name that SageMaker asks for."""
    return await health(gateway)


@router.post("/ping", response_class=Response, responses=failures(409))
async def post_ping(gateway: GatewayDep) -> Response:
    return await health(gateway)


class Version(BaseModel):
    version: str


@router.get("/version")
async def version() -> Version:
    """The gateway's."""
    return Version(version=metadata.version("cartridge-foundry"))


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


class Readiness(BaseModel):
    status: Literal["ok", "unavailable"]
    reasons: dict[str, str]
    """What can't be reached, and why."""

    warnings: list[str]
    """What does not keep from serving; for people."""


@router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
async def readyz(
    gateway: GatewayDep,
    exclude: Annotated[list[str] | None, Query(description="Checks to leave out: `store`, `rollouts`.")] = None,
) -> JSONResponse:
    """Store and at least one rollout server can be reached; 503 with the reasons if not. `warnings` are for people.

    Without Redis resident cartridges are still served: a probe that decides on traffic should exclude `store`.
    """
    reasons: dict[str, str] = {}
    warnings: list[str] = []
    for name, check in (("store", gateway.store.ping), ("rollouts", gateway.check_rollouts)):
        if name not in (exclude or []):
            try:
                await check()
            except FoundryError as error:
                reasons[name] = error.message
    # Tenants' names are for those who show a key.
    if gateway.authentication is None:
        with suppress(FoundryError):
            warnings = gateway.base_name.warnings()
    answer = Readiness(status="unavailable" if reasons else "ok", reasons=reasons, warnings=warnings)
    return JSONResponse(answer.model_dump(), status_code=503 if reasons else 200)
