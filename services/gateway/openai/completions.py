"""/v1/completions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request, Response

from foundry.errors import InvalidArgument
from foundry.v1 import common_pb2, rollout_pb2
from services.gateway.access.principal import Principal, PrincipalDep
from services.gateway.access.route import ScopedRoute
from services.gateway.openai.answers import Completion, TextChoice, TextLogprobs
from services.gateway.openai.delivery import respond
from services.gateway.openai.generation import Choice, Generation
from services.gateway.openai.rendering import Renderer
from services.gateway.openai.requests.completion import CompletionRequest
from services.gateway.openai.target import Target
from services.gateway.openai.tokens import TokenSpelling, by_text, finite, places_of
from services.gateway.openapi import EVENTS, failures
from services.gateway.state import Gateway, GatewayDep

router = APIRouter(tags=["OpenAI"], route_class=ScopedRoute)


@router.post("/v1/completions", response_model=Completion, responses=EVENTS | failures(404, 409, 504))
async def completions(
    asked: CompletionRequest, request: Request, gateway: GatewayDep, principal: PrincipalDep
) -> Response:
    """Continue each prompt. Choice i of prompt j has index j * n + i."""
    return await respond(await prepared(gateway, principal, asked), request)


async def prepared(gateway: Gateway, principal: Principal, asked: CompletionRequest) -> Renderer:
    """Raises what resolving the target raises, and InvalidArgument."""
    target = await Target.resolve(gateway, principal, asked)
    prompts = [
        rollout_pb2.GenerateRequest(text=prompt)
        if isinstance(prompt, str)
        else rollout_pb2.GenerateRequest(token_ids=common_pb2.TokenIds(ids=prompt))
        for prompt in asked.prompt
    ]
    echoes = [_echo(gateway.spelling, prompt) for prompt in asked.prompt] if asked.echo else ()
    generation = Generation(gateway, principal, target, asked, prompts, "cmpl", echoes=echoes)
    return _Text(generation, gateway.spelling)


def _echo(spelling: TokenSpelling, prompt: str | list[int]) -> str:
    """The prompt as text. Raises InvalidArgument."""
    if isinstance(prompt, str):
        return prompt
    contents = [spelling.spell(token_id)[1] for token_id in prompt]
    if None in contents:
        raise InvalidArgument(
            "the gateway can't spell these tokens: echo needs a prompt of text, or the setting `tokenizer`",
            field="echo",
        )
    return b"".join(bytes(content or ()) for content in contents).decode(errors="replace")


class _Text(Renderer):
    body = chunk_body = Completion
    opens = False

    def choice(self, choice: Choice, shared: dict[str, Any]) -> TextChoice:
        prompt_logprobs = self.prompt_logprobs(choice)
        return TextChoice(text=choice.echo + choice.text, prompt_logprobs=prompt_logprobs, **shared)

    def delta_choice(self, part: Choice, shared: dict[str, Any], *, first: bool) -> TextChoice:
        return self.choice(part, shared)

    def logprobs(self, part: Choice) -> TextLogprobs:
        tokens = [self._text(token_id) for token_id in part.ids]
        logprobs: list[float] = [finite(logprob) for logprob in part.logprobs]
        tops: list[dict[str, float] | None] | None = None
        if part.top_logprobs:
            # The sampled token is always among them, as with OpenAI.
            tops = [
                self._alternatives([(token_id, logprob), *zip(top.ids, top.logprobs, strict=True)])
                for top, token_id, logprob in zip(part.top_logprobs, part.ids, part.logprobs, strict=True)
            ]
        own = TextLogprobs(tokens=tokens, token_logprobs=[*logprobs], top_logprobs=tops, text_offset=part.offsets)
        if not (part.echo and part.prompt_logprobs.ids):
            return own
        prompt = self._prompt(part.prompt_logprobs)
        tops = None if prompt.top_logprobs is None else [*prompt.top_logprobs, *(own.top_logprobs or [])]
        return TextLogprobs(
            tokens=[*prompt.tokens, *own.tokens],
            token_logprobs=[*prompt.token_logprobs, *own.token_logprobs],
            top_logprobs=tops,
            text_offset=[*prompt.text_offset, *own.text_offset],
        )

    def _prompt(self, scores: rollout_pb2.PromptLogprobs) -> TextLogprobs:
        """Of an echoed prompt, in the same form."""
        tokens = [self._text(token_id) for token_id in scores.ids]
        logprobs = [None, *(finite(logprob) for logprob in scores.logprobs[1:])]
        tops: list[dict[str, float] | None] | None = None
        if wanted := self.generation.asked.num_logprobs:
            num = len(scores.top_ids) // len(scores.ids)
            tops = [None]
            for place in range(1, len(tokens)):
                top = slice(place * num, place * num + wanted)
                others = zip(scores.top_ids[top], scores.top_logprobs[top], strict=True)
                tops.append(self._alternatives([(scores.ids[place], scores.logprobs[place]), *others]))
        offsets = places_of(self.spelling.spell(token_id)[1] for token_id in scores.ids)
        return TextLogprobs(tokens=tokens, token_logprobs=logprobs, top_logprobs=tops, text_offset=offsets)

    def _alternatives(self, tokens: Iterable[tuple[int, float]]) -> dict[str, float]:
        return by_text((token_id, self._text(token_id), finite(logprob)) for token_id, logprob in tokens)

    def _text(self, token_id: int) -> str:
        return self.spelling.spell(token_id)[0]
