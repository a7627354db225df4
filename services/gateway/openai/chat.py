"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from foundry.errors import InvalidArgument
from foundry.v1 import rollout_pb2
from services.gateway.access.principal import Principal, PrincipalDep
from services.gateway.access.route import ScopedRoute
from services.gateway.openai import answers
from services.gateway.openai.calling import Calling
from services.gateway.openai.conversation import conversation_of, ignored_by
from services.gateway.openai.delivery import respond
from services.gateway.openai.generation import Choice, Generation
from services.gateway.openai.rendering import Renderer
from services.gateway.openai.requests.chat import ChatRequest
from services.gateway.openai.target import Target
from services.gateway.openai.tokens import TokenSpelling, finite
from services.gateway.openapi import EVENTS, failures
from services.gateway.state import Gateway, GatewayDep

router = APIRouter(tags=["OpenAI"], route_class=ScopedRoute)


@router.post("/v1/chat/completions", response_model=answers.ChatCompletion, responses=EVENTS | failures(404, 409, 504))
async def chat_completions(
    asked: ChatRequest, request: Request, gateway: GatewayDep, principal: PrincipalDep
) -> Response:
    """Answer a conversation. Behind a cartridge, which holds the system message, the messages are its turn."""
    return await respond(await prepared(gateway, principal, asked), request)


async def prepared(gateway: Gateway, principal: Principal, asked: ChatRequest) -> Renderer:
    """Raises what resolving the target raises, and InvalidArgument."""
    target = await Target.resolve(gateway, principal, asked)
    tools = asked.shown_tools
    can_be_read = target.model.tool_format or asked.forces_calls
    if tools and "tools" in target.model.renders and not can_be_read:
        raise InvalidArgument(
            "the model's chat template writes calls of tools in a format that can't be read from answers", field="tools"
        )
    prompt = rollout_pb2.GenerateRequest(conversation=conversation_of(asked, tools))
    generation = Generation(gateway, principal, target, asked, [prompt], "chatcmpl")
    generation.ignored = ignored_by(target.model, asked)
    return _Chat(generation, gateway.spelling, asked)


class _Chat(Renderer):
    body = answers.ChatCompletion
    chunk_body = answers.ChatCompletionChunk
    opens = True

    def __init__(self, generation: Generation, spelling: TokenSpelling, asked: ChatRequest) -> None:
        super().__init__(generation, spelling)
        own = generation.target.model.tool_format if asked.shown_tools else ""
        self._tool_format = "json" if asked.forces_calls else own
        self.withholds = bool(self._tool_format)
        self._one_call = asked.parallel_tool_calls is False
        # Of choices that may call tools.
        self._calling: dict[int, Calling] = {}

    def whole(self, choices: Sequence[Choice]) -> BaseModel:
        # Where vLLM has them: the prompt is the same for all choices.
        return super().whole(choices).model_copy(update={"prompt_logprobs": self.prompt_logprobs(choices[0])})

    def choice(self, choice: Choice, shared: dict[str, Any]) -> answers.ChatChoice:
        text, calls = self._read(choice, shared["index"], last=True)
        self._name_reason(shared)
        for call in calls or []:
            # Places are for those who put pieces together.
            call.index = None
        message = answers.AssistantMessage(content=text, tool_calls=calls)
        return answers.ChatChoice(message=message, **shared)

    def delta_choice(self, part: Choice, shared: dict[str, Any], *, first: bool) -> answers.ChatDeltaChoice:
        # A part that says why the choice ends has nothing else.
        text, calls = (None, None) if part.finish_reason else self._read(part, shared["index"], last=part.is_last)
        self._name_reason(shared)
        delta = answers.ChatDelta(role="assistant" if first else None, content=text, tool_calls=calls)
        return answers.ChatDeltaChoice(delta=delta, **shared)

    def _read(self, part: Choice, index: int, *, last: bool) -> tuple[str | None, list[answers.AnsweredCall] | None]:
        """Text and tool calls of a part."""
        if not self._tool_format:
            return part.text, None
        calling = self._calling.setdefault(index, Calling(self._tool_format, one_call=self._one_call))
        text, calls = calling.read(part.text, last=last)
        return (text or None if calls else text), calls or None

    def _name_reason(self, shared: dict[str, Any]) -> None:
        """Who called tools stopped for them."""
        calling = self._calling.get(shared["index"])
        if shared["finish_reason"] == "stop" and calling is not None and calling.num_calls:
            shared["finish_reason"] = "tool_calls"

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
