"""A conversation as the rollout servers get it, and what of it the model's chat template has no use for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from foundry.v1 import common_pb2
from services.gateway.balancer import ServedModel
from services.gateway.openai.requests.messages import Message
from services.gateway.openai.requests.template import TemplateRequest

# The newer name of the one, the older of the other; chat templates know these.
_ROLES = {"developer": "system", "function": "tool"}


def conversation_of(asked: TemplateRequest, tools: Sequence[dict[str, Any]]) -> common_pb2.Conversation:
    continued = bool(asked.continue_final_message)
    return common_pb2.Conversation(
        messages=map(_message, asked.messages),
        tools_json=_json(tools),
        variables_json=_json(asked.chat_template_kwargs),
        continue_final_message=continued,
        omit_generation_prompt=continued or asked.add_generation_prompt is False,
    )


def ignored_by(model: ServedModel, asked: TemplateRequest) -> list[str]:
    """Parameters that change nothing. What changes the meaning of a conversation is refused by the rollout server."""
    variables = sorted(set(asked.chat_template_kwargs or {}) - model.variables)
    return [f"chat_template_kwargs.{name}" for name in variables] + [
        f"messages.{index}.{name}"
        for index, message in enumerate(asked.messages)
        for name, value in (
            ("name", message.name),
            ("tool_call_id", message.tool_call_id),
            ("reasoning_content", message.reasoning_content or message.reasoning),
        )
        if value and name not in model.renders
    ]


def _message(message: Message) -> common_pb2.Message:
    calls = [
        common_pb2.ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
        for call in message.tool_calls or []
    ]
    if message.function_call is not None:
        calls.append(common_pb2.ToolCall(name=message.function_call.name, arguments=message.function_call.arguments))
    return common_pb2.Message(
        role=_ROLES.get(message.role, message.role),
        content=message.content,
        tool_calls=calls,
        tool_call_id=message.tool_call_id or "",
        name=message.name or "",
        reasoning_content=message.reasoning_content or message.reasoning or "",
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if value else ""
