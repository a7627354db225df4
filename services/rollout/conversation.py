"""A conversation on the wire as a chat template gets it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from foundry.errors import InvalidArgument
from foundry.model.template import Rendering
from foundry.untrusted import parse_json, parse_object
from foundry.v1 import common_pb2

T = TypeVar("T")


def template_input(conversation: common_pb2.Conversation) -> tuple[list[dict[str, Any]], Rendering]:
    """Its messages, and how they are to be rendered. Raises InvalidArgument, which names the message."""
    tools = _parsed(conversation.tools_json, "tools", parse_json) or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InvalidArgument("tools must be a list of objects", field="tools")
    how = Rendering(
        tools=tools,
        variables=_parsed(conversation.variables_json, "chat_template_kwargs", parse_object) or {},
        generation_prompt=not conversation.omit_generation_prompt,
        continue_final_message=conversation.continue_final_message,
    )
    return [_message(message, f"messages[{index}]") for index, message in enumerate(conversation.messages)], how


def _message(message: common_pb2.Message, where: str) -> dict[str, Any]:
    """As OpenAI's, without what is null."""
    rendered: dict[str, Any] = {"role": message.role}
    if message.HasField("content"):
        rendered["content"] = message.content
    for name in ("reasoning_content", "tool_call_id", "name"):
        if text := getattr(message, name):
            rendered[name] = text
    if message.tool_calls:
        rendered["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": _parsed(
                        call.arguments, f"{where}.tool_calls[{index}].function.arguments", parse_object
                    )
                    or {},
                },
            }
            for index, call in enumerate(message.tool_calls)
        ]
    elif not message.HasField("content"):
        raise InvalidArgument(f"{where}.content is missing", field=f"{where}.content")
    return rendered


def _parsed(text: str, field: str, parse: Callable[[str], T]) -> T | None:
    """None for "". Templates write JSON in their own way, so they get its value."""
    try:
        return parse(text) if text else None
    except InvalidArgument as error:
        raise InvalidArgument(f"{field}: {error.message}", field=field) from error
