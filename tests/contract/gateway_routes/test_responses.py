"""OpenAI's responses: what a chat answers, in other words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.contract.gateway_routes.site import Site
from tests.services import openai_client

ASKED: dict[str, Any] = {"model": "tiny", "max_output_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[OpenAI]:
    with openai_client(site.gateway) as client:
        yield client


def test_a_response_is_what_chat_answers(client: OpenAI) -> None:
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is open?"}],
        max_tokens=8,
        temperature=0,
    )
    parts: list[Any] = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What is open?"}]}
    ]
    given: Any
    for given in ("What is open?", parts):
        response = client.responses.create(
            **ASKED, input=given, instructions="Be brief.", metadata={"a": "b"}, store=True
        )
        assert response.output_text == chat.choices[0].message.content
        assert (response.status, response.metadata) == ("incomplete", {"a": "b"})
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        assert chat.usage is not None
        assert response.usage is not None
        assert response.usage.input_tokens == chat.usage.prompt_tokens
        assert response.usage.output_tokens == chat.usage.completion_tokens == 8


def test_a_stream_has_the_standards_events(client: OpenAI) -> None:
    whole = client.responses.create(**ASKED, input="What is open?")
    with client.responses.stream(**ASKED, input="What is open?") as stream:
        events = list(stream)
    last: Any = events[-1]
    assert last.response.output_text == whole.output_text
    kinds: list[str] = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert deltas > 1
    assert kinds == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *["response.output_text.delta"] * deltas,
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"temperature": 9}, "temperature"),
        ({"max_output_tokens": 100_000}, "max_output_tokens"),
        ({"model": "nobody"}, "model"),
    ],
)
def test_refusals_name_the_parameter(client: OpenAI, options: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as caught:
            client.responses.create(**ASKED | {"input": "?", "stream": stream} | options)
        assert (caught.value.status_code in (400, 404), caught.value.body["param"]) == (True, param)  # type: ignore[index]
