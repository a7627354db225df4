"""/v1/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from foundry.v1 import common_pb2, rollout_pb2
from services.gateway.access.principal import PrincipalDep
from services.gateway.access.route import ScopedRoute
from services.gateway.openai.answers import Completion, TextChoice, TextLogprobs
from services.gateway.openai.delivery import respond
from services.gateway.openai.generation import Choice, Generation
from services.gateway.openai.rendering import Renderer
from services.gateway.openai.requests import CompletionRequest
from services.gateway.openai.target import Target
from services.gateway.openai.tokens import by_text, finite
from services.gateway.openapi import EVENTS, failures
from services.gateway.state import GatewayDep

router = APIRouter(tags=["OpenAI"], route_class=ScopedRoute)


@router.post("/v1/completions", response_model=Completion, responses=EVENTS | failures(404, 409, 504))
async def completions(
    asked: CompletionRequest, request: Request, gateway: GatewayDep, principal: PrincipalDep
) -> Response:
    """Continue each prompt. Choice i of prompt j has index j * n + i."""
    target = await Target.resolve(gateway, principal, asked)
    prompts = [
        rollout_pb2.GenerateRequest(text=prompt)
        if isinstance(prompt, str)
        else rollout_pb2.GenerateRequest(token_ids=common_pb2.TokenIds(ids=prompt))
        for prompt in asked.prompt
    ]
    generation = Generation(gateway, principal, target, asked, prompts, "cmpl")
    return await respond(_Text(generation, gateway.spelling), request)


class _Text(Renderer):
    body = chunk_body = Completion

    def choice(self, choice: Choice, shared: dict[str, Any]) -> TextChoice:
        return TextChoice(text=choice.text, **shared)

    def delta_choice(self, part: Choice, shared: dict[str, Any], *, first: bool) -> TextChoice:
        return self.choice(part, shared)

    def logprobs(self, part: Choice) -> TextLogprobs:
        tokens = [self._text(token_id) for token_id in part.ids]
        logprobs = [finite(logprob) for logprob in part.logprobs]
        tops = None
        if part.top_logprobs:
            # The sampled token is always among them, as with OpenAI.
            tops = [
                by_text(self._spelled(*each) for each in [sampled, *zip(top.ids, top.logprobs, strict=True)])
                for top, *sampled in zip(part.top_logprobs, part.ids, part.logprobs, strict=True)
            ]
        return TextLogprobs(tokens=tokens, token_logprobs=logprobs, top_logprobs=tops, text_offset=part.offsets)

    def _spelled(self, token_id: int, logprob: float) -> tuple[int, str, float]:
        return token_id, self._text(token_id), finite(logprob)

    def _text(self, token_id: int) -> str:
        return self.spelling.spell(token_id)[0]
