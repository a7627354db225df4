"""OpenAI's completions of text, as its official client meets them."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.contract.openai_api.served import BASE, Served, extension


def test_a_completion_stream_ends_with_the_reason_alone(served: Served) -> None:
    options: dict[str, Any] = {"model": BASE, "prompt": "The treaty", "max_tokens": 8, "temperature": 0, "logprobs": 1}
    whole = served.client.completions.create(**options).choices[0]
    *contents, last = [chunk.choices[0] for chunk in served.client.completions.create(stream=True, **options)]
    assert (last.text, last.logprobs, last.finish_reason) == ("", None, whole.finish_reason)
    assert "".join(choice.text for choice in contents) == whole.text
    assert {choice.finish_reason for choice in contents} == {None}
    assert whole.logprobs is not None
    streamed = [token for choice in contents if choice.logprobs for token in choice.logprobs.tokens or []]
    assert streamed == whole.logprobs.tokens


@pytest.mark.parametrize(("num_prompt_tokens", "expected"), [(100, 16), (500, 12), (511, 1)])
def test_a_completion_is_as_short_as_openais(served: Served, num_prompt_tokens: int, expected: int) -> None:
    options: dict[str, Any] = {"prompt": [40] * num_prompt_tokens, "extra_body": {"ignore_eos": True}}
    answer = served.client.completions.create(model=BASE, **options)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == expected


def test_completions_take_every_spelling_of_a_prompt(served: Served) -> None:
    text = "The treaty was signed"
    ids = served.spelling.encode(text, add_special_tokens=False)
    expected = served.text(served.stack.greedy(ids, [], 8))
    for prompt, num_prompts in ((text, 1), ([text, text], 2), (ids, 1), ([ids, ids], 2)):
        answer = served.client.completions.create(model=BASE, prompt=prompt, max_tokens=8, temperature=0)
        assert [choice.text for choice in answer.choices] == [expected] * num_prompts
        assert [choice.index for choice in answer.choices] == list(range(num_prompts))
        assert answer.object == "text_completion"
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == num_prompts * len(ids)


def test_completions_behind_a_cartridge_with_several_prompts_and_choices(served: Served) -> None:
    prompts = ["The treaty", "The harbour is"]
    options: dict[str, Any] = {"model": "handbook@1", "max_tokens": 10, "temperature": 1.0, "seed": 3}
    answer = served.client.completions.create(prompt=prompts, n=2, **options)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for index, choice in enumerate(answer.choices):
        alone = served.client.completions.create(prompt=prompts[index // 2], **options | {"seed": 3 + index % 2})
        assert choice.text == alone.choices[0].text
    texts = ["", "", "", ""]
    for chunk in served.client.completions.create(prompt=prompts, n=2, stream=True, **options):
        for part in chunk.choices:
            texts[part.index] += part.text
    assert texts == [choice.text for choice in answer.choices]
    ids = served.spelling.encode(prompts[0], add_special_tokens=False)
    greedy = served.client.completions.create(**options | {"prompt": prompts[0], "temperature": 0})
    assert greedy.choices[0].text == served.text(served.stack.greedy(ids, [served.cartridges[0]], 10))


def test_a_stream_whose_prompts_end_out_of_order(served: Served) -> None:
    prompts = [[40] * 500, [40] * 3]
    stream = served.client.completions.create(model="handbook", prompt=prompts, stream=True, max_tokens=1)
    infos = {chunk.choices[0].index: extension(chunk) for chunk in stream if chunk.model_extra}
    assert set(infos) == {0, 1}
    assert all([used["version"] for used in info["cartridges"]] == [2] for info in infos.values())


def test_completion_logprobs_have_the_legacy_shape(served: Served) -> None:
    answer = served.client.completions.create(model=BASE, prompt="The treaty", max_tokens=6, temperature=0, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    assert answer.usage is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 6
    for token, value, tops in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert tops[token] == value == max(tops.values())
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    assert logprobs.text_offset[0] == 0


def test_no_alternative_is_lost_to_another_that_is_no_character_either(served: Served) -> None:
    # Of 384 tokens 128 are a part of a character.
    many: dict[str, Any] = {"max_tokens": 40, "temperature": 1, "seed": 3, "logprobs": 20}
    (choice,) = served.client.completions.create(model=BASE, prompt="The treaty", **many).choices
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.top_logprobs is not None
    assert {len(tops) for tops in choice.logprobs.top_logprobs} <= {20, 21}
    assert all(token in tops for token, tops in zip(choice.logprobs.tokens, choice.logprobs.top_logprobs, strict=True))
    assert any(token.startswith("bytes:") for tops in choice.logprobs.top_logprobs for token in tops)


def test_text_offsets_are_the_tokens_own_whatever_is_held_back(served: Served) -> None:
    options: dict[str, Any] = {"model": BASE, "prompt": "The treaty", "max_tokens": 80, "temperature": 1, "seed": 3}
    options |= {"logprobs": 1, "extra_body": {"ignore_eos": True}}
    (plain,) = served.client.completions.create(**options).choices
    # Nearly every token might begin one of them.
    stop = [f"{character}\0" for character in sorted(set(plain.text))[-16:]]
    (whole,) = served.client.completions.create(stop=stop, **options).choices
    assert whole.text == plain.text
    assert whole.logprobs == plain.logprobs
    assert whole.logprobs is not None
    tokens, offsets = whole.logprobs.tokens or [], whole.logprobs.text_offset or []
    streamed: list[int] = []
    for chunk in served.client.completions.create(stop=stop, stream=True, **options):
        logprobs = chunk.choices[0].logprobs
        streamed += (logprobs.text_offset or []) if logprobs is not None else []
    assert streamed == offsets
    # Spelled alike where a token is no part of a character, nor one that steers.
    own = [(token, at) for token, at in zip(tokens, offsets, strict=True) if not token.startswith(("bytes:", "<|"))]
    assert len(own) > 40
    assert all(whole.text[at : at + len(token)] == token for token, at in own)
    # Of an answer that a stop string ends too: it would have gone on like this.
    cut = plain.text[40:43]
    (stopped,) = served.client.completions.create(stop=cut, **options).choices
    assert stopped.text == plain.text[: plain.text.index(cut)]
    assert stopped.logprobs is not None
    assert stopped.logprobs.text_offset == offsets[: len(stopped.logprobs.text_offset or [])]


@pytest.mark.parametrize("prompt", ["", [], [[]], [-1], ["a", 1], [2**40], 5])
def test_impossible_prompts_are_refused(served: Served, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        served.client.completions.create(model=BASE, prompt=prompt)
    assert raised.value.param == "prompt"


def test_ids_outside_the_vocabulary_are_refused(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        served.client.completions.create(model=BASE, prompt=[5, 10_000])
    assert raised.value.param == "prompt"
