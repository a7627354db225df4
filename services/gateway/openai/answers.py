"""OpenAI's answers, whole and in chunks. Extensions: `foundry`, and `token_ids` where they are asked for."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from services.gateway.openai.requests.parameters import Rope

# Fields marked so are left out while None; the others are sent as null, as OpenAI does.
_OMITTED_IF_NONE: Any = Field(default=None, exclude_if=lambda value: value is None)


class CartridgeInfo(BaseModel):
    name: str
    version: int
    digest: str


class FoundryInfo(BaseModel):
    """What the answer was computed with."""

    model_fingerprint: str
    template_digest: str
    cartridges: list[CartridgeInfo]
    rope: Rope
    """Where keys of several cartridges stood: as trained, or each behind the ones before it."""
    cartridge_tokens: int | None = _OMITTED_IF_NONE
    ignored: list[str] | None = _OMITTED_IF_NONE
    """Parameters that the model's chat template has no use for."""


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class UsageInfo(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    # Of an answer that is not complete it is not known.
    prompt_tokens_details: PromptTokensDetails | None = _OMITTED_IF_NONE


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class PromptLogprob(BaseModel):
    logprob: float
    rank: int
    decoded_token: str


# None stands for the prompt's first token.
PromptLogprobs = list[dict[str, PromptLogprob] | None]


class FunctionCall(BaseModel):
    name: str
    arguments: str


class AnsweredCall(BaseModel):
    index: int | None = _OMITTED_IF_NONE
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[AnsweredCall] | None = _OMITTED_IF_NONE


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | None = _OMITTED_IF_NONE


class _Answer(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    foundry: FoundryInfo | None = _OMITTED_IF_NONE


class ChatCompletion(_Answer):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: UsageInfo
    prompt_logprobs: PromptLogprobs | None = _OMITTED_IF_NONE


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = _OMITTED_IF_NONE
    content: str | None = _OMITTED_IF_NONE
    tool_calls: list[AnsweredCall] | None = _OMITTED_IF_NONE


class ChatDeltaChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | None = _OMITTED_IF_NONE


class ChatCompletionChunk(_Answer):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatDeltaChoice]
    usage: UsageInfo | None = _OMITTED_IF_NONE


class TextLogprobs(BaseModel):
    """Of a prompt's first token nothing is known: null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | None = _OMITTED_IF_NONE
    prompt_logprobs: PromptLogprobs | None = _OMITTED_IF_NONE


class Completion(_Answer):
    """Whole, or one chunk of a stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: UsageInfo | None = _OMITTED_IF_NONE
