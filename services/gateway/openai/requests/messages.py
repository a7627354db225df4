"""A conversation, as clients send it and send it again with the answers."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, model_validator

from foundry.validation import FirstError, of_field
from services.gateway.openai.requests.parameters import Parameters, Text

NEUTRAL: dict[str, tuple[Any, ...]] = {"annotations": ([],), "audio": (), "refusal": ()}
_CARTRIDGE = re.compile(r"<cartridge>\s*\{")


def as_text(value: Any) -> Any:
    """Content as text: OpenAI's list of parts is joined by newlines, as vLLM does."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError("only parts of type 'text' are supported")
    return "\n".join(part["text"] for part in value)


class CalledFunction(Parameters):
    name: Text
    arguments: Text
    """A JSON object as text."""


class ToolCall(Parameters):
    # Clients that put a call together from the pieces of a stream leave its place in it.
    ignored: ClassVar[frozenset[str]] = frozenset({"index"})

    id: Text = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Parameters):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[Text | None, BeforeValidator(as_text, json_schema_input_type=str | list[dict[str, str]])] = None
    """Null where an assistant calls tools and says nothing."""

    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], FirstError()] | None = None
    """Of the assistant."""

    tool_call_id: Text | None = None
    """Of a tool: the call that it answers."""

    reasoning_content: Text | None = None
    """Of the assistant; `reasoning` is the same."""

    reasoning: Text | None = None
    function_call: CalledFunction | None = None
    """Older name of a single tool call; such a function answers with the role `function`."""

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        of_assistant = (self.tool_calls, self.function_call, self.reasoning_content, self.reasoning)
        if self.role != "assistant" and any(of_assistant):
            raise ValueError("only an assistant has tool_calls, function_call and reasoning_content")
        if self.role != "tool" and self.tool_call_id:
            raise ValueError("only a tool has a tool_call_id")
        if self.content is None and not self.tool_calls and self.function_call is None:
            raise ValueError("content is missing")
        return self

    @model_validator(mode="after")
    def _no_cartridge_in_text(self) -> Self:
        """Tokasaurus serves cartridges that a system message names so: the model alone would read it as text."""
        content = (self.content or "") if self.role in ("system", "developer") else ""
        begun = _CARTRIDGE.search(content)
        if begun is not None and "</cartridge>" in content[begun.end() :]:
            raise of_field("content", "names a cartridge by <cartridge>{…}</cartridge>: name it in `model`")
        return self
