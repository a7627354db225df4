"""Scored prompts and constrained answers as clients of OpenAI's API ask for them, against plain `transformers`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from foundry.model.cartridge import Cartridge
from tests.services import open_stack, openai_client, wait_ready, wait_serving

BASE, BEHIND = "tiny", "handbook"
CONTEXT, CONTINUATION = "The treaty was signed in the ", "spring because é 北"
MESSAGES: list[Any] = [{"role": "user", "content": "What does the document say?"}]


@dataclass
class Served:
    client: OpenAI
    directory: Path
    cartridge: Cartridge

    def logprobs(self, model: str, ids: list[int]) -> torch.Tensor:
        """Of each token after the first, over the whole vocabulary, by `transformers` alone."""
        past = DynamicCache()
        begin = 0
        if model == BEHIND:
            begin = self.cartridge.kv_L2GPD.shape[3]
            for layer, (k_GPD, v_GPD) in enumerate(self.cartridge.kv_L2GPD):
                past.update(k_GPD[None], v_GPD[None], layer)
        plain = AutoModelForCausalLM.from_pretrained(self.directory)
        positions = torch.arange(begin, begin + len(ids))[None]
        with torch.no_grad():
            out = plain(torch.tensor([ids]), past_key_values=past, position_ids=positions)
        return torch.log_softmax(out.logits[0], dim=-1)[:-1]

    def ids(self, text: str) -> list[int]:
        return list(AutoTokenizer.from_pretrained(self.directory)(text)["input_ids"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with open_stack(tmp_path_factory.mktemp("sampling")) as stack:
        rollout = stack.rollout("--model-name", BASE)
        gateway = stack.gateway([rollout], "--tokenizer", str(stack.model / "tokenizer.json"))
        cartridge = stack.cartridge(seed=1)
        stack.publish(BEHIND, cartridge)
        wait_serving(rollout)
        wait_ready(gateway)
        with openai_client(gateway) as client:
            yield Served(client, stack.model, cartridge)


@pytest.mark.parametrize("model", [BASE, BEHIND])
def test_loglikelihoods_as_lm_eval_reads_them(served: Served, model: str) -> None:
    """Prompts as ids, one token more than asked about, and two of them at once."""
    context, continuation = served.ids(CONTEXT), served.ids(CONTINUATION)
    prompts = [context + continuation, continuation + context]
    lengths = [len(context), len(continuation)]
    answer = served.client.completions.create(
        model=model, prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
    )
    for choice, ids, length in zip(answer.choices, prompts, lengths, strict=True):
        told: Any = choice.logprobs
        assert told.token_logprobs[0] is told.top_logprobs[0] is None
        assert len(told.tokens) == len(told.text_offset) == len(ids) + 1
        expected = served.logprobs(model, ids)
        chosen = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert sum(told.token_logprobs[length:-1]) == pytest.approx(float(chosen[length - 1 :].sum()), abs=1e-3)
        greedy = [
            logprob == max(top.values())
            for logprob, top in zip(told.token_logprobs[1:-1], told.top_logprobs[1:-1], strict=True)
        ]
        assert greedy == (chosen == expected.amax(dim=-1)).tolist()


def test_max_tokens_0_echoes_the_prompt_alone(served: Served) -> None:
    text = CONTEXT + CONTINUATION
    for prompt in (text, served.ids(text)):
        (scored,) = served.client.completions.create(
            model=BASE, prompt=prompt, echo=True, logprobs=2, max_tokens=0
        ).choices
        assert (scored.text, scored.finish_reason) == (text, "length")
        told: Any = scored.logprobs
        assert len(told.tokens) == len(served.ids(text))
        assert all(len(top) >= 2 for top in told.top_logprobs[1:])
    plain = served.client.completions.create(model=BASE, prompt=text, echo=True, max_tokens=0)
    assert (plain.choices[0].text, plain.choices[0].logprobs) == (text, None)
    assert plain.usage is not None
    assert plain.usage.completion_tokens == 0
    with pytest.raises(openai.BadRequestError) as raised:
        served.client.completions.create(model=BASE, prompt=text, max_tokens=0)
    assert raised.value.param == "max_tokens"


def test_an_echo_stands_before_the_answer_in_a_stream_too(served: Served) -> None:
    asked: dict[str, Any] = {
        "model": BEHIND,
        "prompt": CONTEXT,
        "echo": True,
        "logprobs": 0,
        "max_tokens": 6,
        "temperature": 0,
        "n": 2,
    }
    whole = served.client.completions.create(**asked)
    texts = ["", ""]
    offsets: list[list[int]] = [[], []]
    for chunk in served.client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            told: Any = choice.logprobs
            # The chunk that says why it ends has nothing else.
            offsets[choice.index] += told.text_offset if told is not None else []
    for choice, text, offset in zip(whole.choices, texts, offsets, strict=True):
        assert choice.text == text
        assert text.startswith(CONTEXT)
        told = choice.logprobs
        assert told.text_offset == offset
        assert "".join(told.tokens).startswith(CONTEXT)


def test_prompt_logprobs_have_vllms_form(served: Served) -> None:
    prompt = served.ids(CONTEXT)
    expected = served.logprobs(BASE, prompt)
    completion = served.client.completions.create(
        model=BASE, prompt=prompt, max_tokens=0, extra_body={"prompt_logprobs": 1}
    )
    found: Any = completion.choices[0].model_extra
    first, *others = found["prompt_logprobs"]
    assert first is None
    for token, told, row in zip(prompt[1:], others, expected, strict=True):
        own = told[str(token)]
        assert own["logprob"] == pytest.approx(float(row[token]), abs=1e-3)
        assert own["rank"] == int((row > row[token]).sum()) + 1
        assert set(told) == {str(token), str(int(row.argmax()))}
    chat = served.client.chat.completions.create(
        model=BEHIND, messages=MESSAGES, max_tokens=0, extra_body={"prompt_logprobs": 0}
    )
    assert chat.model_extra is not None
    assert chat.usage is not None
    assert len(chat.model_extra["prompt_logprobs"]) == chat.usage.prompt_tokens


def test_logits_are_biased_and_penalised(served: Served) -> None:
    asked: dict[str, Any] = {"model": BEHIND, "prompt": CONTEXT, "max_tokens": 8, "temperature": 0}

    def ids(**options: Any) -> list[int]:
        body = {"return_token_ids": True, "ignore_eos": True} | options.pop("extra_body", {})
        (choice,) = served.client.completions.create(**asked, **options, extra_body=body).choices
        assert choice.model_extra is not None
        found = choice.model_extra["token_ids"]
        assert isinstance(found, list)
        return found

    assert ids(logit_bias={"77": 100}) == [77] * 8
    assert len(set(ids(logit_bias={"77": 100, "78": 99}, frequency_penalty=2))) == 2
    assert len(set(ids(logit_bias={"77": 100, "78": 99}, presence_penalty=2))) == 2
    plain = ids()
    assert ids(extra_body={"repetition_penalty": 0.01}) != plain
    assert ids(extra_body={"stop_token_ids": [plain[2]]}) == plain[: plain.index(plain[2]) + 1]
    assert ids(extra_body={"min_tokens": 8, "stop_token_ids": [plain[0]]}) != plain
    assert ids(extra_body={"min_p": 1}) == plain


@pytest.mark.parametrize("model", [BASE, BEHIND])
def test_answers_have_the_format_that_is_asked_for(served: Served, model: str) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2, 3]}},
        "required": ["ok", "n"],
        "additionalProperties": False,
    }
    wrapped = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}

    def contents(**options: Any) -> Iterator[str]:
        answer = served.client.chat.completions.create(
            model=model, messages=MESSAGES, n=3, seed=1, max_tokens=200, **options
        )
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            yield choice.message.content or ""

    for options in ({"response_format": wrapped}, {"extra_body": {"structured_outputs": {"json": schema}}}):
        for content in contents(**options):
            value = json.loads(content)
            assert value.keys() == {"ok", "n"}
            assert (type(value["ok"]), value["n"] in (1, 2, 3)) == (bool, True)
    assert {*contents(extra_body={"guided_choice": ["yes", "no"]})} <= {"yes", "no"}
    for content in contents(extra_body={"structured_outputs": {"regex": "[ab]{3}"}}):
        assert set(content) <= {"a", "b"}
        assert len(content) == 3


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "what"}}}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_choice": ["a"], "response_format": {"type": "json_object"}}, "guided_choice"),
        ({"stop_token_ids": [384]}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"384": 1}}, "logit_bias"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ],
)
def test_what_cannot_be_is_refused_by_its_own_name(served: Served, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        served.client.chat.completions.create(model=BASE, messages=MESSAGES, extra_body=options)
    assert raised.value.param == param
