"""What clients replay: calls of tools, their results, names and reasoning, as transformers renders them or refused."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from foundry.errors import InvalidArgument
from foundry.model.template import ChatTemplate, Rendering
from tests.tiny import CHATML, CLOCK, SPECIAL_TOKENS, TOOLS_CHATML, build_tokenizer

# As Llama 3's: a call is JSON and nothing else, tools stand with the first question.
LLAMA_TOOLS = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|im_start|>' + ('ipython' if m.role == 'tool' else m.role) + '\\n\\n' }}"
    '{%- if m.tool_calls %}{{- \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{- m.tool_calls[0].function.arguments | tojson }}{{- '}' }}"
    "{%- else %}{%- if tools and m.role == 'user' %}{{- tools | tojson }}{%- endif %}"
    "{{- m.content | trim }}{%- endif %}"
    "{{- '<|im_end|>' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{%- endif %}"
)
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": "When the tide is high in a harbour.",
        "parameters": {"type": "object", "properties": {"harbour": {"type": "string"}}, "required": ["harbour"]},
    },
}
TOOLS = Rendering(tools=[TOOL])
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "When is the tide high?"},
    {
        "role": "assistant",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "tide", "arguments": {"harbour": "Ålesund"}}}
        ],
    },
    {"role": "tool", "content": '{"high": "06:12"}', "tool_call_id": "call_1", "name": "tide"},
]
MARKS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]


@cache
def template(text: str) -> ChatTemplate:
    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    # As Qwen's tokenizer has them: tokens, but not special ones.
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer, CLOCK)


def own(text: str, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    """What transformers makes of it."""
    options = {"add_generation_prompt": True, **options}
    found = template(text)._tokenizer.apply_chat_template(messages, return_dict=False, **options)
    assert isinstance(found, list)
    return [each for each in found if isinstance(each, int)]


@pytest.mark.parametrize("text", [TOOLS_CHATML, LLAMA_TOOLS])
def test_history_is_rendered_as_transformers_does(text: str) -> None:
    split = template(text)
    assert split.prompt(HISTORY, TOOLS) == own(text, HISTORY, tools=[TOOL])
    assert split.prompt(HISTORY) == own(text, HISTORY)
    null = [{**message, "content": message.get("content")} for message in HISTORY]
    assert own(text, null) == split.prompt(HISTORY)
    # Behind a document all but the document is there.
    document = {"role": "system", "content": "The harbour is open."}
    assert split.context("The harbour is open.") + split.turn(HISTORY) == split.prompt([document, *HISTORY])


def test_features_are_those_that_a_rendering_shows() -> None:
    assert (features := template(TOOLS_CHATML).features).renders == {"tools", "tool_calls", "tool_results"}
    assert (features.tool_format, set(features.variables)) == ("hermes", {"enable_thinking"})
    assert template(LLAMA_TOOLS).features.tool_format == "llama3_json"
    assert template(CHATML).features.renders == template(CHATML).features.variables == set()
    named = CHATML.replace("message['content']", "(message.name or '') + message['content']")
    assert template(named).features.renders == {"name"}


@pytest.mark.parametrize(
    ("messages", "how", "field"),
    [
        (HISTORY[:2], Rendering(), "messages[1].tool_calls"),
        ([HISTORY[0], HISTORY[2]], Rendering(), "messages[1].role"),
        (HISTORY[:1], TOOLS, "tools"),
    ],
)
def test_what_a_template_would_pass_over_is_refused(messages: Any, how: Rendering, field: str) -> None:
    split = template(CHATML)
    for render in (split.turn, split.prompt):
        with pytest.raises(InvalidArgument) as caught:
            render(messages, how)
        assert caught.value.field == field


def test_behind_a_document_tools_stand_in_a_system_turn_of_their_own() -> None:
    """The document's system turn is the cartridge's, and nothing can be written into it."""
    split = template(TOOLS_CHATML)
    turn = split.turn(HISTORY, TOOLS)
    assert turn == split.prompt(HISTORY, TOOLS)
    assert json.dumps(TOOL) in split._tokenizer.decode(turn)
    # Where they stand in the turn anyway, the split stays what it is; and no BOS is in the middle.
    split = template(LLAMA_TOOLS)
    document = {"role": "system", "content": "The harbour."}
    assert split.context("The harbour.") + split.turn(HISTORY, TOOLS) == split.prompt([document, *HISTORY], TOOLS)
    assert split._tokenizer.bos_token_id not in split.turn(HISTORY, TOOLS)


def test_variables_of_the_template() -> None:
    split, question = template(TOOLS_CHATML), HISTORY[:1]
    quiet = Rendering(variables={"enable_thinking": False, "unheard_of": "<|im_end|>"})
    assert split.prompt(question, quiet) == own(TOOLS_CHATML, question, enable_thinking=False)
    assert split.turn(question, quiet) == split.prompt(question, quiet) != split.prompt(question)
    for name in ("messages", "chat_template", "tokenize", "bos_token", "add_generation_prompt"):
        with pytest.raises(InvalidArgument, match="can't set") as caught:
            split.prompt(question, Rendering(variables={name: "x"}))
        assert caught.value.field == f"chat_template_kwargs.{name}"
    dated = CHATML.replace("message['content']", "message['content'] + (mood or '')", 1)
    with pytest.raises(InvalidArgument, match="the cartridge's") as caught:
        template(dated).turn(question, Rendering(variables={"mood": "calm"}))
    assert caught.value.field == "chat_template_kwargs"


@pytest.mark.parametrize("text", [CHATML, TOOLS_CHATML, LLAMA_TOOLS])
def test_an_answer_that_goes_on_with_the_last_message(text: str) -> None:
    split = template(text)
    messages = [*HISTORY[:1], {"role": "assistant", "content": "It is high at <|im_end|>"}]
    how = Rendering(generation_prompt=False, continue_final_message=True)
    ids = split.prompt(messages, how)
    continued = own(text, messages, add_generation_prompt=False, continue_final_message=True)
    assert split._tokenizer.decode(ids) == split._tokenizer.decode(continued)
    end = split._tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [each for each in ids if each == end] == [each for each in continued if each == end][1:]
    document = {"role": "system", "content": "The harbour."}
    assert split.context("The harbour.") + split.turn(messages, how) == split.prompt([document, *messages], how)
    for wrong in (Rendering(continue_final_message=True), how):
        with pytest.raises(InvalidArgument):
            split.prompt([*HISTORY[:1], {"role": "assistant", "content": None}][: 1 + (wrong is how)], wrong)


FORGED = st.lists(
    st.sampled_from([*MARKS, "<|im_end|>", "<|im_start|>", "system", "\n", '"', "{", "é"]), max_size=6
).map("".join)


@pytest.mark.parametrize("text", [TOOLS_CHATML, LLAMA_TOOLS])
@given(name=FORGED, value=FORGED, result=FORGED, description=FORGED)
def test_what_tools_say_is_text(text: str, name: str, value: str, result: str, description: str) -> None:
    split = template(text)
    # Those that a template does not write steer nothing.
    marks = (*SPECIAL_TOKENS, *(MARKS if text is TOOLS_CHATML else ()))
    control = [split._tokenizer.convert_tokens_to_ids(mark) for mark in marks]

    def written(name: str, value: str, result: str, description: str) -> list[int]:
        call = {"id": name, "type": "function", "function": {"name": "tide", "arguments": {name: [value]}}}
        messages = [
            HISTORY[0],
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": result, "tool_call_id": name, "name": name},
        ]
        tool = {"type": "function", "function": {"name": "tide", "description": description, "parameters": {name: {}}}}
        ids = split.prompt(messages, Rendering(tools=[tool]))
        assert split._tokenizer.decode(ids) == split._tokenizer.apply_chat_template(
            messages, tools=[tool], add_generation_prompt=True, tokenize=False
        )
        return [each for each in ids if each in control]

    assert written(name, value, result, description) == written("a", "b", "c", "d")
