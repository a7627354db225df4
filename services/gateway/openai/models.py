"""/v1/models: the base model, and every cartridge as a model of its own."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from foundry.errors import CartridgeNotFound, InvalidArgument, ModelNotFound
from services.gateway.access.names import full_text, visible
from services.gateway.access.principal import PrincipalDep
from services.gateway.access.route import ScopedRoute
from services.gateway.balancer import ServedModel
from services.gateway.openapi import failures
from services.gateway.resources.listing import MAX_PAGE, After, Limit, Listing, for_each, page_of_names
from services.gateway.state import Gateway, GatewayDep

router = APIRouter(tags=["OpenAI"], route_class=ScopedRoute)
_STARTED = int(time.time())


class ModelCard(BaseModel):
    """OpenAI's model object with vLLM's additions: `parent` of a cartridge is the base model, `root` its version.

    `max_model_len` is for prompt and answer; a cartridge's own tokens do not count.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "foundry"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(Listing):
    data: list[ModelCard]


@router.get("/v1/models", responses=failures(409))
async def models(gateway: GatewayDep, principal: PrincipalDep, limit: Limit = MAX_PAGE, after: After = "") -> ModelList:
    """The base model, then cartridges by name. OpenAI's clients take the first page for all there are."""
    served = gateway.rollouts.model()
    names, next_after = page_of_names(visible(principal, await gateway.store.names()), after, limit)
    cards = await for_each(names, lambda name: _card(gateway, served, name))
    data = cards if after else [_base(served), *cards]
    return ModelList(data=data, has_more=next_after is not None, last_id=next_after)


@router.get("/v1/models/{model:path}", responses=failures(404, 409))
async def model(model: str, gateway: GatewayDep, principal: PrincipalDep) -> ModelCard:
    """`model` is the base model or any cartridge reference."""
    served = gateway.rollouts.model()
    if model == served.name:
        return _base(served)
    try:
        return await _card(gateway, served, full_text(principal, model, field="model", to_query=True))
    except (CartridgeNotFound, InvalidArgument) as error:
        raise ModelNotFound(f"there is no model {model!r}: {error.message}", field="model") from error


def _base(served: ServedModel) -> ModelCard:
    return ModelCard(id=served.name, created=_STARTED, root=served.name, max_model_len=served.max_sequence_tokens)


async def _card(gateway: Gateway, served: ServedModel, reference: str) -> ModelCard:
    found = await gateway.store.resolve(reference)
    manifest = await gateway.store.manifest(found.name, found.version)
    return ModelCard(
        id=reference,
        created=int(datetime.fromisoformat(manifest.created_at).timestamp()),
        root=str(found),
        parent=served.name,
        max_model_len=served.max_sequence_tokens,
    )
