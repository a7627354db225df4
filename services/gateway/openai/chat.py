"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from foundry.v1 import common_pb2, rollout_pb2
from services.gateway.access.principal import PrincipalDep
from services.gateway.access.route import ScopedRoute
from services.gateway.openai import answers
from services.gateway.openai.delivery import respond
from services.gateway.openai.generation import Choice, Generation
from services.gateway.openai.rendering import Renderer
from services.gateway.openai.requests import ChatRequest
from services.gateway.openai.target import Target
from services.gateway.openai.tokens import finite
from services.gateway.openapi import EVENTS, failures
from services.gateway.state import GatewayDep

router = APIRouter(tags=["OpenAI"], route_class=ScopedRoute)


@router.post("/v1/chat/completions", response_model=answers.ChatCompletion, responses=EVENTS | failures(404, 409, 504))
async def chat_completions(
    asked: ChatRequest, request: Request, gateway: GatewayDep, principal: PrincipalDep
) -> Response:
    """Answer a conversation. Behind a cartridge, which holds the system message, the messages are its turn."""
    target = await Target.resolve(gateway, principal, asked)
    conversation = common_pb2.Conversation(
        messages=[common_pb2.Message(role=_role(message.role), content=message.content) for message in asked.messages]
    )
    prompt = rollout_pb2.GenerateRequest(conversation=conversation)
    generation = Generation(gateway, principal, target, asked, [prompt], "chatcmpl")
    return await respond(_Chat(generation, gateway.spelling), request)


def _role(role: str) -> str:
    # OpenAI's newer name; chat templates know the older.
    return "system" if role == "developer" else role


class _Chat(Renderer):
    body = answers.ChatCompletion
    chunk_body = answers.ChatCompletionChunk
    opens = True

    def whole(self, choices: Sequence[Choice]) -> BaseModel:
        # Where vLLM has them: the prompt is the same for all choices.
        return super().whole(choices).model_copy(update={"prompt_logprobs": self.prompt_logprobs(choices[0])})

    def choice(self, choice: Choice, shared: dict[str, Any]) -> answers.ChatChoice:
        return answers.ChatChoice(message=answers.AssistantMessage(content=choice.text), **shared)

    def delta_choice(self, part: Choice, shared: dict[str, Any], *, first: bool) -> answers.ChatDeltaChoice:
        content = None if part.finish_reason else part.text
        return answers.ChatDeltaChoice(
            delta=answers.ChatDelta(role="assistant" if first else None, content=content), **shared
        )

    def logprobs(self, part: Choice) -> answers.ChatLogprobs:
        tops = part.top_logprobs or [rollout_pb2.TopLogprobs()] * len(part.ids)
        content = [
            answers.TokenLogprob(
                **self._spelled(token_id, logprob),
                top_logprobs=[
                    answers.TopLogprob(**self._spelled(other, value))
                    for other, value in zip(top.ids, top.logprobs, strict=True)
                ],
            )
            for token_id, logprob, top in zip(part.ids, part.logprobs, tops, strict=True)
        ]
        return answers.ChatLogprobs(content=content)

    def _spelled(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, content = self.spelling.spell(token_id)
        return {"token": text, "logprob": finite(logprob), "bytes": content}
