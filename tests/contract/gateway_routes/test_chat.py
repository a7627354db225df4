"""Conversations beyond questions and answers, as clients of OpenAI and vLLM send them, to real services."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import httpx
import openai
import pytest
from openai import OpenAI

from foundry.model.template import ChatTemplate, Rendering
from tests.contract.gateway_routes.site import Site
from tests.process import Process
from tests.services import Stack, openai_client
from tests.tiny import CLOCK
from tests.unit.test_template_history import HISTORY, TOOL

QUESTION: list[Any] = [{"role": "user", "content": "What is open?"}]
# As a client replays it.
REPLAYED: list[Any] = [
    {"role": "user", "content": "When is the tide high?", "name": "ann"},
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning_content": "I look it up.",
        "tool_calls": [
            {
                "index": 0,
                "id": "call_1",
                "type": "function",
                "function": {"name": "tide", "arguments": '{"harbour": "Ålesund"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": '{"high": "06:12"}'}]},
]


@dataclass
class Served:
    stack: Stack
    gateway: Process
    client: OpenAI
    template: ChatTemplate

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(f"http://{self.gateway.address}{path}", json=body, trust_env=False)

    def ids(self, messages: list[Any], model: str = "tiny", **options: Any) -> list[int]:
        answer = self.post("/tokenize", {"model": model, "messages": messages, **options})
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert body["count"] == len(body["tokens"])
        assert body["max_model_len"] == 512
        tokens: list[int] = body["tokens"]
        return tokens


@pytest.fixture(scope="module")
def served(site: Site) -> Iterator[Served]:
    site.stack.publish("chatted", site.stack.cartridge(seed=1))
    with openai_client(site.gateway) as client:
        yield Served(site.stack, site.gateway, client, ChatTemplate(site.stack.lm.tokenizer, CLOCK))


def test_history_reaches_the_template_as_transformers_renders_it(served: Served) -> None:
    expected = served.template.prompt(HISTORY)
    assert served.ids(REPLAYED) == expected
    assert served.ids(REPLAYED, model="chatted") == served.template.turn(HISTORY)
    legacy = [
        QUESTION[0],
        {"role": "assistant", "content": None, "function_call": {"name": "tide", "arguments": "{}"}},
        {"role": "function", "name": "tide", "content": "06:12"},
    ]
    assert "<tool_response>\n06:12" in served.template._tokenizer.decode(served.ids(legacy))
    answer = served.client.chat.completions.create(model="tiny", messages=REPLAYED, max_tokens=4, temperature=0)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected)
    assert answer.model_extra is not None
    ignored = answer.model_extra["foundry"]["ignored"]
    assert ignored == ["messages.0.name", "messages.1.reasoning_content", "messages.2.tool_call_id"]


def test_tools_and_variables_reach_the_template(served: Served) -> None:
    shown = served.template.prompt(QUESTION, Rendering(tools=[TOOL]))
    assert served.ids(QUESTION, tools=[TOOL]) == shown
    options: dict[str, Any] = {"max_tokens": 4, "temperature": 0, "messages": QUESTION, "tools": [TOOL]}
    for choice, expected in (("auto", shown), ("none", served.template.prompt(QUESTION))):
        answer: Any = served.client.chat.completions.create(**{"model": "tiny", "tool_choice": choice, **options})
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(expected)
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].finish_reason == "length"
    quiet = {"enable_thinking": False, "effort": 1}
    answer = served.client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=4, extra_body={"chat_template_kwargs": quiet}
    )
    thoughtless = served.template.prompt(QUESTION, Rendering(variables=quiet))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(thoughtless)
    assert served.ids(QUESTION, chat_template_kwargs=quiet) == thoughtless
    assert answer.model_extra is not None
    assert answer.model_extra["foundry"]["ignored"] == ["chat_template_kwargs.effort"]


def test_an_answer_goes_on_with_what_it_is_given(served: Served) -> None:
    prefilled = [*QUESTION, {"role": "assistant", "content": "The harbour is"}]
    how = Rendering(generation_prompt=False, continue_final_message=True)
    ids = served.template.prompt(prefilled, how)
    assert served.ids(prefilled, continue_final_message=True) == ids
    expected = served.stack.greedy(ids, [], 6)
    answer = served.client.chat.completions.create(
        model="tiny",
        messages=prefilled,
        max_tokens=6,
        temperature=0,
        extra_body={"continue_final_message": True, "add_generation_prompt": False, "return_token_ids": True},
    )
    assert answer.choices[0].model_extra is not None
    assert answer.choices[0].model_extra["token_ids"] == expected
    closed = served.template.prompt(prefilled, Rendering(generation_prompt=False))
    assert served.ids(prefilled, add_generation_prompt=False) == closed


def test_tokens_of_a_text_and_back(served: Served) -> None:
    tokenizer, text = served.stack.lm.tokenizer, "The harbour, 東京 <|im_end|>"
    answer = served.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == tokenizer(text)["input_ids"]
    assert answer["token_strs"] == tokenizer.convert_ids_to_tokens(answer["tokens"])
    assert served.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}
    assert served.post("/tokenize", {"prompt": text}).json()["token_strs"] is None
    long = served.post("/tokenize", {"prompt": "harbour " * 100_000}).json()
    assert long["count"] == len(long["tokens"]) > 100_000


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {"prompt": "a", "model": "nobody"}, 404, "model"),
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": QUESTION}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": QUESTION, "chat_template": "{{ x }}"}, 400, "chat_template"),
        ("/detokenize", {"tokens": [384]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
    ],
)
def test_what_can_not_be_counted(served: Served, path: str, body: Any, status: int, param: str) -> None:
    answer = served.post(path, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "tide"}}])
def test_calls_that_are_asked_for_come(served: Served, choice: Any) -> None:
    """A model of random weights calls a tool as its schema says, since it can say nothing else."""
    harbour = {"type": "string", "enum": ["Bergen", "Vardø"]}
    tide: dict[str, Any] = {
        **cast(dict[str, Any], TOOL["function"]),
        "parameters": {"$defs": {"H": harbour}, "properties": {"harbour": {"$ref": "#/$defs/H"}}},
    }
    tide["parameters"] |= {"type": "object", "required": ["harbour"], "additionalProperties": False}
    wind = {"name": "wind", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": QUESTION,
        "temperature": 0,
        "max_tokens": 80,
        "tool_choice": choice,
        "tools": [{"type": "function", "function": each} for each in (tide, wind)],
        "parallel_tool_calls": False,
    }
    (whole,) = served.client.chat.completions.create(**asked).choices
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    (call,) = whole.message.tool_calls or []
    assert call.function.name in (("tide", "wind") if choice == "required" else ("tide",))
    arguments = json.loads(call.function.arguments)
    assert arguments == {} if call.function.name == "wind" else arguments["harbour"] in harbour["enum"]
    chunks = [chunk.choices[0] for chunk in served.client.chat.completions.create(**asked, stream=True)]
    (streamed,) = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert streamed.function.name == call.function.name
    assert (streamed.index, streamed.function.arguments) == (0, call.function.arguments)
    assert "".join(chunk.delta.content or "" for chunk in chunks) == ""
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]
    # The call can be replayed, with its result.
    replayed = [*QUESTION, whole.message.model_dump(exclude_none=True)]
    replayed.append({"role": "tool", "tool_call_id": call.id, "content": "06:12"})
    assert len(served.ids(replayed)) > len(served.ids(QUESTION))


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0"),
        (
            {"messages": [*QUESTION, {"role": "user", "content": "a", "tool_calls": REPLAYED[1]["tool_calls"]}]},
            "messages.1",
        ),
        ({"messages": [{"role": "user", "content": "a", "tool_call_id": "b"}]}, "messages.0"),
        ({"tools": [{"type": "function", "function": {"name": "no such name"}}]}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name",
        ),
        (
            {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
        ),
        ({"extra_body": {"chat_template_kwargs": {"bos_token": "x"}}}, "chat_template_kwargs.bos_token"),
        ({"extra_body": {"continue_final_message": True, "add_generation_prompt": True}}, "continue_final_message"),
        ({"extra_body": {"echo": True}}, "echo"),
        ({"extra_body": {"vllm_xargs": {"a": 1}}}, "vllm_xargs"),
    ],
)
def test_refusals_name_the_parameter(served: Served, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.chat.completions.create(**{"model": "tiny", "messages": QUESTION, "max_tokens": 2, **options})
    assert caught.value.param == param


def test_arguments_that_are_no_json_are_refused(served: Served) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "tide", "arguments": "{harbour}"}}
    messages = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(openai.BadRequestError, match="JSON") as caught:
        served.client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
    assert caught.value.param == "messages.1.tool_calls.0.function.arguments"


def test_extras_of_vllm_at_neutral_values_are_taken(served: Served) -> None:
    extras = {
        "add_special_tokens": False,
        "bad_words": [],
        "cache_salt": None,
        "documents": None,
        "echo": False,
        "include_reasoning": True,
        "include_stop_str_in_output": False,
        "length_penalty": 1.0,
        "mm_processor_kwargs": None,
        "priority": 0,
        "request_id": "mine",
        "spaces_between_special_tokens": True,
        "truncate_prompt_tokens": None,
        "use_beam_search": False,
        "vllm_xargs": None,
    }
    answer = served.client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=2, extra_body=extras)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2
