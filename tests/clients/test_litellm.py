"""litellm: chat, a stream, and a tool call through its OpenAI-compatible provider."""

from __future__ import annotations

import json
from typing import Any

import litellm

from tests.clients.conftest import BASE, CARTRIDGE, TIDE, Site

MESSAGES: list[Any] = [{"role": "user", "content": "What is open?"}]


def test_chat_stream_and_a_tool_call(site: Site) -> None:
    asked: dict[str, Any] = {"api_base": site.url, "api_key": "unused", "messages": MESSAGES, "temperature": 0}
    for name in (BASE, CARTRIDGE):
        answer = litellm.completion(model=f"openai/{name}", max_tokens=8, **asked)
        pieces = litellm.completion(model=f"openai/{name}", max_tokens=8, stream=True, **asked)
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert text == answer.choices[0].message.content
    answer = litellm.completion(
        model=f"openai/{BASE}", max_tokens=80, tools=[TIDE], tool_choice="required", parallel_tool_calls=False, **asked
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "tide"
    assert json.loads(call.function.arguments)["harbour"] in ("Bergen", "Vardø")
