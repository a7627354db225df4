"""Its routes. Answers are JSON where Tokasaurus' batch route pickles."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from foundry.errors import FoundryError, InvalidArgument
from foundry.tasks import end
from services.gateway.access.principal import Principal, PrincipalDep
from services.gateway.access.route import ScopedRoute
from services.gateway.openai import chat, completions
from services.gateway.openai.answers import ChatCompletion, Completion
from services.gateway.openai.delivery import respond, unless_disconnected
from services.gateway.openai.generation import Choice
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
    if not _takes_json(request):
        raise InvalidArgument("answers are JSON, pickles are not sent: accept application/json", field="accept")
    # Together they are one request, and can't ask for more than one may.
    if (num_choices := sum(each.num_choices for each in asked.requests)) > gateway.settings.max_choices:
        raise InvalidArgument(
            f"{num_choices} answers exceed {gateway.settings.max_choices} choices of one request", field="requests"
        )
    renderers = []
    for place, each in enumerate(asked.requests):
        with _named(place):
            if each.stream:
                raise InvalidArgument("several answers are not streamed", field="stream")
            renderers.append(await prepared_chat(gateway, principal, each))
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
    """The first failure ends all of them."""
    asking = [asyncio.create_task(_gathered(place, renderer)) for place, renderer in enumerate(renderers)]
    try:
        answers = await asyncio.gather(*asking)
    finally:
        await end(*asking)
    return [renderer.whole(choices) for renderer, choices in zip(renderers, answers, strict=True)]


async def _gathered(place: int, renderer: Renderer) -> list[Choice]:
    with _named(place):
        return await renderer.generation.gather()


@contextmanager
def _named(place: int) -> Iterator[None]:
    """What fails within is that request's of a batch."""
    try:
        yield
    except FoundryError as error:
        if error.field is not None:
            error.field = f"requests.{place}.{error.field}"
        raise


def _takes_json(request: Request) -> bool:
    """Whether JSON is among what the client reads; one that does not say reads anything."""
    accepted = ",".join(request.headers.getlist("accept")).lower().split(",")
    names = {each.partition(";")[0].strip() for each in accepted} - {""}
    return not names or not names.isdisjoint({"application/json", "application/*", "*/*"})
