"""langchain: an agent's turn, from the call of a tool to the answer to its result."""

from __future__ import annotations

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from tests.clients.conftest import BASE, CARTRIDGE, Site


@tool  # type: ignore[untyped-decorator,unused-ignore]
def tide(harbour: bool) -> str:
    """When the tide is high in a harbour."""
    return f"06:12 {harbour}"


def test_chat_stream_and_a_tools_turn(site: Site) -> None:
    question = HumanMessage("When is the tide high?")
    for name in (BASE, CARTRIDGE):
        model = ChatOpenAI(
            base_url=site.url, api_key=SecretStr("unused"), model=name, temperature=0, max_completion_tokens=80
        )
        answer = model.invoke([question])
        assert "".join(str(piece.content) for piece in model.stream([question])) == answer.content
        calling = model.bind_tools([tide], tool_choice="required", parallel_tool_calls=False).invoke([question])
        (call,) = calling.tool_calls
        assert call["name"] == "tide"
        result = ToolMessage(tide.invoke(call["args"]), tool_call_id=call["id"])
        assert isinstance(model.invoke([question, calling, result]).content, str)
