"""/tokenize and /detokenize, as vLLM has them: the ids that a prompt has for the model, and the text of ids."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, ClassVar, TypeVar

from fastapi import APIRouter, Body
from pydantic import BaseModel, PlainValidator, ValidationError

from foundry.errors import FoundryError
from foundry.v1 import rollout_pb2, rollout_pb2_grpc
from foundry.validation import invalid_argument
from services.gateway.access.principal import Principal, PrincipalDep
from services.gateway.access.route import ScopedRoute
from services.gateway.openai.conversation import conversation_of
from services.gateway.openai.generation import parameter
from services.gateway.openai.requests.parameters import ModelReference, Parameters, Text, is_ids
from services.gateway.openai.requests.template import TemplateRequest
from services.gateway.openai.target import Target
from services.gateway.openapi import failures
from services.gateway.state import Gateway, GatewayDep

router = APIRouter(tags=["OpenAI"], route_class=ScopedRoute)
T = TypeVar("T")


class _Counting(Parameters):
    model: ModelReference = ""
    """As in completions; unset: the base model. Behind a cartridge the turn alone is counted."""

    return_token_strs: bool | None = None
    """Add the tokens as the vocabulary has them."""

    @property
    def cartridges(self) -> None:
        return None

    @property
    def rope(self) -> None:
        return None


class TokenizeTextRequest(_Counting):
    prompt: Text
    add_special_tokens: bool | None = None
    """False: none before the text. Behind a cartridge there are none."""


class TokenizeChatRequest(_Counting, TemplateRequest):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "add_special_tokens": (False,),
        "chat_template": (),
        "media_io_kwargs": ({},),
        "mm_processor_kwargs": ({},),
    }


class TokenizeAnswer(BaseModel):
    count: int
    max_model_len: int
    """Of prompt and answer."""

    tokens: list[int]
    token_strs: list[str] | None = None


def _ids(value: Any) -> list[int]:
    if not is_ids(value):
        raise ValueError("expected a list of token ids")
    ids: list[int] = value
    return ids


class DetokenizeRequest(_Counting):
    tokens: Annotated[list[int], PlainValidator(_ids, json_schema_input_type=list[int])]


class DetokenizeAnswer(BaseModel):
    prompt: str


_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"oneOf": [kind.model_json_schema() for kind in (TokenizeTextRequest, TokenizeChatRequest)]}
            }
        },
    }
}


@router.post("/tokenize", openapi_extra=_BODY, responses=failures(404, 409, 504))
async def tokenize(
    body: Annotated[dict[str, Any], Body()], gateway: GatewayDep, principal: PrincipalDep
) -> TokenizeAnswer:
    """The ids of a `prompt` or of `messages`, as a completion reads them; of any length that a body may have."""
    asked = _read(body)
    target = await _target(gateway, principal, asked)
    request = rollout_pb2.TokenizeRequest(
        model_fingerprint=target.model.fingerprint,
        behind_cartridge=bool(target.cartridges),
        return_token_strs=bool(asked.return_token_strs),
    )
    if isinstance(asked, TokenizeChatRequest):
        request.conversation.CopyFrom(conversation_of(asked, asked.tools or []))
    else:
        request.text, request.omit_special_tokens = asked.prompt, asked.add_special_tokens is False
    answer = await _ask(gateway, lambda stub, seconds: stub.Tokenize(request, timeout=seconds))
    return TokenizeAnswer(
        count=len(answer.ids),
        max_model_len=target.model.max_sequence_tokens,
        tokens=list(answer.ids),
        token_strs=list(answer.token_strs) if asked.return_token_strs else None,
    )


@router.post("/detokenize", responses=failures(404, 409, 504))
async def detokenize(asked: DetokenizeRequest, gateway: GatewayDep, principal: PrincipalDep) -> DetokenizeAnswer:
    """The text of ids, control tokens too."""
    target = await _target(gateway, principal, asked)
    request = rollout_pb2.DetokenizeRequest(model_fingerprint=target.model.fingerprint, ids=asked.tokens)
    answer = await _ask(gateway, lambda stub, seconds: stub.Detokenize(request, timeout=seconds))
    return DetokenizeAnswer(prompt=answer.text)


def _read(body: dict[str, Any]) -> TokenizeTextRequest | TokenizeChatRequest:
    try:
        return (TokenizeChatRequest if "messages" in body else TokenizeTextRequest).model_validate(body)
    except ValidationError as error:
        raise invalid_argument(error.errors()[0]) from error


async def _target(gateway: Gateway, principal: Principal, asked: _Counting) -> Target:
    named = asked if asked.model else asked.model_copy(update={"model": gateway.rollouts.model().name})
    return await Target.resolve(gateway, principal, named)


async def _ask(gateway: Gateway, call: Callable[[rollout_pb2_grpc.RolloutAsyncStub, float], Awaitable[T]]) -> T:
    try:
        deadline = time.monotonic() + gateway.settings.request_timeout_seconds
        return await gateway.rollouts.ask(call, deadline=deadline)
    except FoundryError as error:
        error.field = parameter(error.field)
        raise
