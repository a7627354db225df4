"""What clients of Tokasaurus ask, as requests of OpenAI's API."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from foundry.errors import InvalidArgument
from foundry.untrusted import parse_json
from foundry.validation import FirstError, of_field
from services.gateway.openai.requests.chat import ChatRequest
from services.gateway.openai.requests.completion import CompletionRequest
from services.gateway.openai.requests.messages import as_text
from services.gateway.openai.requests.parameters import ModelReference, Parameters, Text
from services.gateway.openai.requests.sampling import SamplingRequest

MAX_REQUESTS = 256
MAX_CARTRIDGES = 16
_BEGIN, _END = "<cartridge>", "</cartridge>"
_TEMPERATURE = 0.7


class NamedCartridge(Parameters):
    """`source` and `force_redownload` change nothing: an id is a reference, whose bytes are its digest's."""

    id: ModelReference
    """`name`, `name@17`, `name@latest`, `name@tag`, `name@blake3:HEX`."""

    source: Text | None = None
    force_redownload: bool | None = None


def _ids(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    # Each takes longer to check than to send.
    if len(value) > MAX_CARTRIDGES:
        raise ValueError(f"{len(value)} cartridges, at most {MAX_CARTRIDGES} can be taken")
    try:
        return [NamedCartridge.model_validate(each).id for each in value] or None
    except ValidationError as error:
        raise ValueError(f"expected a list of {{id, source, force_redownload}}: {error.errors()[0]['msg']}") from error


class TokasaurusRequest(SamplingRequest):
    model: Text = ""
    """Taken and not looked at: one model is served."""

    cartridges: Annotated[
        Annotated[list[ModelReference], FirstError(), Field(max_length=16)] | None,
        BeforeValidator(_ids, json_schema_input_type=list[NamedCartridge] | None),
    ] = None
    """Before the conversation, in this order."""

    logprobs_in_fingerprint: bool | None = None
    """Logprobs and alternatives are packed into `system_fingerprint`, and nowhere else."""

    @model_validator(mode="after")
    def _check_fingerprint(self) -> Self:
        if self.logprobs_in_fingerprint and self.stream:
            raise InvalidArgument("a stream has no place for it", field="logprobs_in_fingerprint")
        return self

    @property
    def spells_logprobs(self) -> bool:
        return not self.logprobs_in_fingerprint


class TokasaurusCompletion(TokasaurusRequest, CompletionRequest):
    default_max_tokens = 16


class TokasaurusChat(TokasaurusRequest, ChatRequest):
    ignored: ClassVar[frozenset[str]] = ChatRequest.ignored

    apply_chat_template_overrides: dict[str, Any] | None = None
    """Its name for `chat_template_kwargs`."""

    @model_validator(mode="before")
    @classmethod
    def _translate(cls, values: Any) -> Any:
        """System messages may name cartridges: `<cartridge>{"id": …}</cartridge>`."""
        if not isinstance(values, dict):
            return values
        values = {"temperature": _TEMPERATURE} | values
        if overrides := values.pop("apply_chat_template_overrides", None):
            if values.get("chat_template_kwargs"):
                raise of_field("apply_chat_template_overrides", "and chat_template_kwargs are one thing: set one")
            values["chat_template_kwargs"] = overrides
        messages = values.get("messages")
        if not isinstance(messages, list):
            return values
        left, named = [], []
        for place, message in enumerate(messages):
            content, found = _read(message, place)
            named += found
            if content or not found:
                left.append(message | {"content": content} if found else message)
        if named:
            if values.get("cartridges"):
                raise of_field("cartridges", "are named in a system message too: name them in one place")
            values |= {"messages": left, "cartridges": named}
        return values


class BatchOfChats(Parameters):
    requests: Annotated[list[TokasaurusChat], FirstError(), Field(min_length=1, max_length=MAX_REQUESTS)]


def _read(message: Any, place: int) -> tuple[str, list[Any]]:
    """What a system message says besides, and what it names."""
    if not isinstance(message, dict) or message.get("role") not in ("system", "developer"):
        return "", []
    try:
        content, tags = _without_tags(as_text(message.get("content")))
    except ValueError:
        # Content of another kind than text, which the message is refused for.
        return "", []
    if len(tags) > MAX_CARTRIDGES:
        raise of_field(f"messages.{place}.content", f"names {len(tags)} cartridges, at most {MAX_CARTRIDGES}")
    try:
        return content, [parse_json(tag) for tag in tags]
    except InvalidArgument as error:
        raise of_field(f"messages.{place}.content", f"names a cartridge by what is no JSON: {error.message}") from error


def _without_tags(content: Any) -> tuple[str, list[str]]:
    """Looks at each character a few times whatever the text: a pattern would look from each begun tag to the end."""
    if not isinstance(content, str):
        return "", []
    before, *begun = content.split(_BEGIN)
    left, tags = [before], []
    for piece in begun:
        inside, end, behind = piece.partition(_END)
        if end and inside.lstrip().startswith("{"):
            tags.append(inside.strip())
            left.append(behind)
        else:
            left.append(_BEGIN + piece)
    return "".join(left).strip(), tags
