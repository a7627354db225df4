"""llama-index: chat and a stream through its OpenAI-like model."""

from __future__ import annotations

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

from tests.clients.conftest import BASE, CARTRIDGE, Site


def test_chat_and_stream(site: Site) -> None:
    for name in (BASE, CARTRIDGE):
        model = OpenAILike(
            model=name, api_base=site.url, api_key="unused", is_chat_model=True, temperature=0, max_tokens=8
        )
        messages = [ChatMessage(role="user", content="What is open?")]
        answer = model.chat(messages).message.content
        assert "".join(piece.delta or "" for piece in model.stream_chat(messages)) == answer
