"""/v1/responses: OpenAI's newer form of a chat, for text. Nothing is kept: clients send the whole conversation."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request, Response
from fastapi.sse import format_sse_event
from pydantic import BaseModel, Field, PlainValidator, ValidationError

from foundry.errors import FoundryError
from foundry.validation import invalid_argument
from services.gateway import metrics
from services.gateway.access.principal import Principal, PrincipalDep
from services.gateway.access.route import ScopedRoute
from services.gateway.errors import error_body
from services.gateway.openai import chat
from services.gateway.openai.answers import FoundryInfo
from services.gateway.openai.delivery import Chunks, EventStream, unless_disconnected
from services.gateway.openai.generation import Choice, Generation
from services.gateway.openai.requests.chat import ChatRequest
from services.gateway.openai.requests.parameters import Cartridges, ModelReference, Parameters, Rope, Text
from services.gateway.openai.requests.sampling import IGNORED
from services.gateway.openapi import EVENTS, failures
from services.gateway.state import Gateway, GatewayDep

router = APIRouter(tags=["OpenAI"], route_class=ScopedRoute)
_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = ("input_text", "output_text", "text")
# Of a chat's parameters by those that they came from.
_PARAMS = {"max_completion_tokens": "max_output_tokens", "max_tokens": "max_output_tokens"}


def _messages(value: Any) -> list[dict[str, Any]]:
    """A text, or messages of text, as a chat's messages."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise ValueError("expected a string or a list of messages")
    return [_message(item, place) for place, item in enumerate(value)]


def _message(item: Any, place: int) -> dict[str, Any]:
    if not isinstance(item, dict) or item.get("type", "message") != "message" or item.get("role") not in _ROLES:
        raise ValueError(f"{place} is no message of {', '.join(_ROLES)}: only these are supported")
    content = item.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") not in _TEXTS or not isinstance(part.get("text"), str):
                raise ValueError(f"{place} has a part that is no text")
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{place} has no content")
    return {"role": item["role"], "content": content}


class ResponseRequest(Parameters):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "background": (False,),
        "context_management": (),
        "conversation": (),
        "include": ([],),
        "max_tool_calls": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "reasoning": ({}, {"effort": "none"}, {"effort": None, "summary": None}),
        "text": ({}, {"format": {"type": "text"}}),
        "tool_choice": ("auto", "none"),
        "tools": ([],),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }
    ignored: ClassVar[frozenset[str]] = (IGNORED - {"metadata"}) | {"stream_options"}

    model: ModelReference
    """As in chat."""

    cartridges: Cartridges | None = None
    """Extension, as in chat: several, in this order; `model` is the base model."""

    rope: Rope | None = None
    """Extension, as in chat: where the keys of several stand, `keep` or `shift`."""

    input: Annotated[list[dict[str, Any]], PlainValidator(_messages, json_schema_input_type=str | list[dict[str, Any]])]
    """A text, or messages of text."""

    instructions: Text | None = None
    """Stands before the input as a system message."""

    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """Most tokens of the answer; unset: as in chat."""

    temperature: float | None = None
    top_p: float | None = None
    metadata: dict[str, str] | None = None
    """Stands in the answer as it is."""

    stream: bool | None = None
    """Send the answer as server-sent events."""

    def as_chat(self) -> ChatRequest:
        """Raises InvalidArgument, pydantic's ValidationError."""
        instructions = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return ChatRequest.model_validate(
            {
                "model": self.model,
                "cartridges": self.cartridges,
                "rope": self.rope,
                "messages": instructions + self.input,
                "max_completion_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "stream": self.stream,
            }
        )


class ResponseObject(BaseModel):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    background: Literal[False] = False
    error: None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: Literal[True] = True
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float | None
    text: dict[str, Any] = Field(default={"format": {"type": "text"}})
    tool_choice: Literal["auto"] = "auto"
    tools: list[dict[str, Any]] = Field(default=[])
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: dict[str, Any] | None = None
    foundry: FoundryInfo | None = None


@router.post("/v1/responses", response_model=ResponseObject, responses=EVENTS | failures(404, 409, 504))
async def responses(asked: ResponseRequest, request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """Answer a conversation of text. `store` is ignored and `previous_response_id` refused: nothing is kept."""
    response = await prepared(gateway, principal, asked)
    generation = response.generation
    try:
        if asked.stream:
            chunks = generation.chunks()
            first = await unless_disconnected(request.receive, anext(chunks))
            return EventStream(response.events(first, chunks), chunks, generation.headers())
        whole = await unless_disconnected(request.receive, response.gather())
    except FoundryError as error:
        raise _renamed(error) from None
    return Response(whole.model_dump_json(), media_type="application/json", headers=generation.headers())


async def prepared(gateway: Gateway, principal: Principal, asked: ResponseRequest) -> Answering:
    """Raises what chat's does."""
    try:
        renderer = await chat.prepared(gateway, principal, asked.as_chat())
    except ValidationError as error:
        raise _renamed(invalid_argument(error.errors()[0])) from error
    except FoundryError as error:
        raise _renamed(error) from None
    return Answering(asked, renderer.generation)


class Answering:
    """One response."""

    def __init__(self, asked: ResponseRequest, generation: Generation) -> None:
        self._asked = asked
        self.generation = generation
        suffix = generation.id.rpartition("-")[2]
        self._id, self._message_id = f"resp_{suffix}", f"msg_{suffix}"
        self._number = -1

    async def gather(self) -> ResponseObject:
        (choice,) = await self.generation.gather()
        return self._whole(choice)

    async def events(self, first: tuple[int, Any], chunks: Chunks) -> AsyncGenerator[bytes, None]:
        choice, part = Choice(), {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        begun = self._response("in_progress", []).model_dump(mode="json")
        yield self._event("response.created", {"response": begun})
        yield self._event("response.in_progress", {"response": begun})
        yield self._event("response.output_item.added", {"output_index": 0, "item": self._item("in_progress", None)})
        yield self._event("response.content_part.added", part | {"part": _content("")})
        try:
            chunk = first[1]
            while True:
                choice.add(chunk)
                if chunk.text:
                    yield self._event("response.output_text.delta", part | {"delta": chunk.text, "logprobs": []})
                if (arrival := await anext(chunks, None)) is None:
                    break
                chunk = arrival[1]
        except FoundryError as error:
            metrics.ERRORS.labels(error.reason).inc()
            yield self._event("error", error_body(_renamed(error))["error"])
            return
        whole = self._whole(choice)
        yield self._event("response.output_text.done", part | {"text": choice.text, "logprobs": []})
        yield self._event("response.content_part.done", part | {"part": _content(choice.text)})
        yield self._event("response.output_item.done", {"output_index": 0, "item": whole.output[0]})
        yield self._event(f"response.{whole.status}", {"response": whole.model_dump(mode="json")})

    def _whole(self, choice: Choice) -> ResponseObject:
        status: Literal["completed", "incomplete"] = "incomplete" if choice.finish_reason == "length" else "completed"
        response = self._response(status, [self._item(status, choice.text)])
        usage = self.generation.usage()
        details = usage.prompt_tokens_details
        response.usage = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": details.cached_tokens if details is not None else 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        }
        response.foundry = self.generation.info()
        if status == "incomplete":
            response.incomplete_details = {"reason": "max_output_tokens"}
        return response

    def _response(
        self, status: Literal["in_progress", "completed", "incomplete"], output: list[dict[str, Any]]
    ) -> ResponseObject:
        asked = self._asked
        return ResponseObject(
            id=self._id,
            created_at=self.generation.created,
            status=status,
            instructions=asked.instructions,
            max_output_tokens=asked.max_output_tokens,
            metadata=asked.metadata or {},
            model=asked.model,
            output=output,
            temperature=asked.temperature,
            top_p=asked.top_p,
        )

    def _item(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [_content(text)]
        return {"id": self._message_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _event(self, kind: str, values: Mapping[str, Any]) -> bytes:
        self._number += 1
        data = {**values, "type": kind, "sequence_number": self._number}
        return format_sse_event(data_str=json.dumps(data), event=kind)


def _content(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _renamed(error: FoundryError) -> FoundryError:
    """In the words of this route."""
    field = error.field or ""
    error.field = "input" if field.startswith("messages") else _PARAMS.get(field, error.field)
    return error
