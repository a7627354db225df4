"""Its routes. Answers are JSON where Tokasaurus' batch route pickles."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from foundry.errors import InvalidArgument
from foundry.tasks import end
from services.gateway.access.principal import Principal, PrincipalDep
from services.gateway.access.route import ScopedRoute
from services.gateway.openai import chat, completions
from services.gateway.openai.answers import ChatCompletion, Completion
from services.gateway.openai.delivery import respond, unless_disconnected
from services.gateway.openai.rendering import Renderer
from services.gateway.openapi import EVENTS, failures
from services.gateway.state import Gateway, GatewayDep
from services.gateway.tokasaurus.packing import packing
from services.gateway.tokasaurus.requests import BatchOfChats, TokasaurusChat, TokasaurusCompletion

router = APIRouter(tags=["Tokasaurus"], route_class=ScopedRoute)
_FAILURES = failures(404, 409, 504)


class ChatCompletions(BaseModel):
    completions: list[ChatCompletion]


def _both(path: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Its own path, and that of its batches."""

    def route(handler: Callable[..., Any]) -> Callable[..., Any]:
        for prefix in ("/custom/cartridge", "/v1/cartridge"):
            router.post(f"{prefix}{path}", responses=EVENTS | _FAILURES, **options)(handler)
        return handler

    return route


@_both("/completions", response_model=Completion)
async def completion(
    asked: TokasaurusCompletion, request: Request, gateway: GatewayDep, principal: PrincipalDep
) -> Response:
    """Continue each prompt behind cartridges."""
    return await respond(await prepared_completion(gateway, principal, asked), request)


@_both("/chat/completions", response_model=ChatCompletion)
async def chat_completion(
    asked: TokasaurusChat, request: Request, gateway: GatewayDep, principal: PrincipalDep
) -> Response:
    """Answer a conversation behind cartridges, which a system message may name."""
    return await respond(await prepared_chat(gateway, principal, asked), request)


@router.post("/custom/cartridge/synchronous-batch-completions", response_model=ChatCompletions, responses=_FAILURES)
async def batch_completions(
    asked: BatchOfChats, request: Request, gateway: GatewayDep, principal: PrincipalDep
) -> Response:
    """Answer several conversations at once, in order, or none of them."""
    if request.headers.get("accept", "*/*").partition(";")[0].strip() == "application/octet-stream":
        raise InvalidArgument("pickles are not sent: accept application/json", field="accept")
    if any(each.stream for each in asked.requests):
        raise InvalidArgument("several answers are not streamed", field="requests.stream")
    renderers = [await prepared_chat(gateway, principal, each) for each in asked.requests]
    answers = await unless_disconnected(request.receive, _answered(renderers))
    return Response(ChatCompletions(completions=answers).model_dump_json(), media_type="application/json")


async def prepared_completion(gateway: Gateway, principal: Principal, asked: TokasaurusCompletion) -> Renderer:
    """Raises what `completions.prepared` raises."""
    asked = asked.model_copy(update={"model": gateway.rollouts.model().name})
    return packing(await completions.prepared(gateway, principal, asked), asked)


async def prepared_chat(gateway: Gateway, principal: Principal, asked: TokasaurusChat) -> Renderer:
    """Raises what `chat.prepared` raises."""
    asked = asked.model_copy(update={"model": gateway.rollouts.model().name})
    return packing(await chat.prepared(gateway, principal, asked), asked)


async def _answered(renderers: list[Renderer]) -> list[Any]:
    asking = [asyncio.create_task(renderer.generation.gather()) for renderer in renderers]
    try:
        answers = await asyncio.gather(*asking)
    finally:
        await end(*asking)
    return [renderer.whole(choices) for renderer, choices in zip(renderers, answers, strict=True)]
