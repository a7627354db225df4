"""pydantic-ai: an answer of a type, and a stream of text."""

from __future__ import annotations

import asyncio

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from tests.clients.conftest import BASE, CARTRIDGE, Site


class Tide(BaseModel):
    high: bool


def test_an_object_and_a_stream(site: Site) -> None:
    settings = ModelSettings(max_tokens=80, temperature=0)

    async def run(name: str) -> None:
        model = OpenAIChatModel(name, provider=OpenAIProvider(base_url=site.url, api_key="unused"))
        typed: Agent[None, Tide] = Agent(model, output_type=Tide, model_settings=settings, retries=0)
        assert isinstance((await typed.run("Is the tide high?")).output, Tide)
        plain: Agent[None, str] = Agent(model, model_settings=ModelSettings(max_tokens=8, temperature=0))
        whole = (await plain.run("What is open?")).output
        async with plain.run_stream("What is open?") as stream:
            assert [text async for text in stream.stream_text()][-1] == whole

    for name in (BASE, CARTRIDGE):
        asyncio.run(run(name))
