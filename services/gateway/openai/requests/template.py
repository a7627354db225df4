"""What a chat template is given: messages, tools, and how the prompt ends."""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from foundry.errors import InvalidArgument
from foundry.validation import FirstError
from services.gateway.openai.requests.messages import Message
from services.gateway.openai.requests.parameters import Parameters

# Of one request: each takes much longer to check than to send.
MAX_MESSAGES = 2048
MAX_TOOLS = 128
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def _tools(value: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As they are, since a chat template writes them so."""
    for place, tool in enumerate(value):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise ValueError(f'{place} is no tool: {{"type": "function", "function": {{"name": …}}}}')
        if not isinstance(name := function.get("name"), str) or not _TOOL_NAME.fullmatch(name):
            raise ValueError(f"{place} has no name of at most 64 letters, digits, '_', '.' and '-'")
        if not isinstance(function.get("parameters", {}), dict):
            raise ValueError(f"{place} has parameters that are no JSON schema")
    if len({tool["function"]["name"] for tool in value}) < len(value):
        raise ValueError("two tools have one name")
    return value


class TemplateRequest(Parameters):
    """What a chat template is given. Names and ids, reasoning, and variables of `chat_template_kwargs` that the model's
    template does not use change nothing; `foundry.ignored` of the answer names them."""

    messages: Annotated[list[Message], FirstError(), Field(min_length=1, max_length=MAX_MESSAGES)]

    tools: Annotated[list[dict[str, Any]], FirstError(), AfterValidator(_tools), Field(max_length=MAX_TOOLS)] | None = (
        None
    )
    """What the model may call. Refused where the model's chat template has no place for tools."""

    chat_template_kwargs: dict[str, Any] | None = None
    """vLLM's: variables of the chat template, such as `enable_thinking`."""

    continue_final_message: bool | None = None
    """vLLM's: the answer goes on with the last message."""

    add_generation_prompt: bool | None = None
    """vLLM's: false ends the prompt behind the last message; unset: true, but with `continue_final_message`."""

    @model_validator(mode="after")
    def _check_end(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidArgument(
                "continue_final_message and add_generation_prompt exclude each other", field="continue_final_message"
            )
        return self
