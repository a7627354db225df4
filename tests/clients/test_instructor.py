"""instructor: an answer that is an object of a class, by a tool."""

from __future__ import annotations

from typing import Literal

import instructor
import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.clients.conftest import BASE, CARTRIDGE, Site


class Tide(BaseModel):
    harbour: Literal["Bergen", "Vardø"]
    high: bool


@pytest.mark.parametrize("model", [BASE, CARTRIDGE])
def test_an_object(site: Site, model: str) -> None:
    with OpenAI(base_url=site.url, api_key="unused", max_retries=0) as openai:
        client = instructor.from_openai(openai, mode=instructor.Mode.TOOLS)
        tide = client.chat.completions.create(
            model=model,
            response_model=Tide,
            messages=[{"role": "user", "content": "When is the tide high?"}],
            max_tokens=100,
            temperature=0,
            max_retries=0,
        )
    assert tide.harbour in ("Bergen", "Vardø")
