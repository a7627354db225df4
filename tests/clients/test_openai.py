"""The official client."""

from __future__ import annotations

from openai import OpenAI

from tests.clients.conftest import BASE, CARTRIDGE, Site


def test_both_models_answer(site: Site) -> None:
    with OpenAI(base_url=site.url, api_key="unused", max_retries=0) as client:
        assert {BASE, CARTRIDGE} <= {model.id for model in client.models.list()}
        for model in (BASE, CARTRIDGE):
            answer = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "What does the document say?"}], max_tokens=4
            )
            assert answer.usage is not None
            assert 1 <= answer.usage.completion_tokens <= 4
