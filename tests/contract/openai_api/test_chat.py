"""OpenAI's API as its official client meets it: a real gateway before a real rollout server and store."""

from __future__ import annotations

from typing import Any

import openai
import pytest
import torch

from tests.contract.openai_api.served import BASE, MESSAGES, Served, chat, extension


def test_the_base_model_answers_as_the_offline_model(served: Served) -> None:
    ids = served.template.prompt(MESSAGES)
    expected = served.stack.greedy(ids, [], 12)
    answer = chat(served, extra_body={"return_token_ids": True})
    (choice,) = answer.choices
    assert choice.model_extra is not None
    assert choice.model_extra["token_ids"] == expected
    assert (choice.message.content, choice.message.role) == (served.text(expected), "assistant")
    assert answer.model == BASE
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == len(expected)
    assert answer.usage.total_tokens == len(ids) + len(expected)
    assert extension(answer)["cartridges"] == []
    assert extension(answer)["model_fingerprint"] == served.stack.lm.spec.fingerprint
    assert extension(answer)["template_digest"] == served.template.digest
    assert answer.system_fingerprint == "fp_" + served.stack.lm.spec.fingerprint.removeprefix("blake3:")[:12]


@pytest.mark.parametrize(
    ("reference", "version"),
    [
        ("handbook", 2),
        ("handbook@1", 1),
        ("handbook@2", 2),
        ("handbook@latest", 2),
        ("handbook@good", 1),
        ("handbook@DIGEST", 1),
    ],
)
def test_every_form_of_reference_answers_with_exactly_that_cartridge(
    served: Served, reference: str, version: int
) -> None:
    manifest, cartridge = served.manifests[version - 1], served.cartridges[version - 1]
    asked = reference.replace("DIGEST", manifest.digest)
    turn = served.template.turn(MESSAGES)
    expected = served.stack.greedy(turn, [cartridge], 12)
    raw = served.client.chat.completions.with_raw_response.create(
        model=asked, messages=MESSAGES, max_tokens=12, temperature=0, extra_body={"return_token_ids": True}
    )
    answer = raw.parse()
    assert answer.choices[0].model_extra is not None
    assert answer.choices[0].model_extra["token_ids"] == expected
    assert answer.choices[0].message.content == served.text(expected)
    assert answer.model == asked
    assert extension(answer)["cartridges"] == [{"name": "handbook", "version": version, "digest": manifest.digest}]
    assert extension(answer)["cartridge_tokens"] == cartridge.header.num_tokens
    assert raw.headers["x-foundry-cartridge"] == f"handbook@{version}"
    assert raw.headers["x-foundry-digest"] == manifest.digest
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(turn)
    assert expected != served.stack.greedy(turn, [served.cartridges[2 - version]], 12)


def test_a_list_of_cartridges_stands_before_the_conversation_in_its_order(served: Served) -> None:
    turn = served.template.turn(MESSAGES)
    for order in ([0, 1], [1, 0]):
        expected = served.stack.greedy(turn, [served.cartridges[index] for index in order], 12)
        references = [f"handbook@{index + 1}" for index in order]
        answer = chat(served, extra_body={"cartridges": references, "return_token_ids": True})
        assert answer.choices[0].model_extra is not None
        assert answer.choices[0].model_extra["token_ids"] == expected
        assert [entry["version"] for entry in extension(answer)["cartridges"]] == [index + 1 for index in order]
        assert extension(answer)["cartridge_tokens"] == 19


def test_a_cartridge_list_needs_the_base_model(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        chat(served, model="handbook", extra_body={"cartridges": ["handbook@1"]})
    assert raised.value.param == "model"
    with pytest.raises(openai.NotFoundError) as missing:
        chat(served, extra_body={"cartridges": ["handbook@1", "nobody"]})
    assert (missing.value.param, missing.value.code) == ("cartridges.1", "CARTRIDGE_NOT_FOUND")
    with pytest.raises(openai.BadRequestError) as misspelt:
        chat(served, extra_body={"cartridges": ["Not A Name"]})
    assert misspelt.value.param == "cartridges.0"


def test_streamed_deltas_are_the_whole_answer(served: Served) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 40, "n": 2}
    whole = chat(served, model="handbook", **options)
    stream = served.client.chat.completions.create(
        model="handbook", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **options
    )
    texts, roles, reasons, usages, infos = ["", ""], [0, 0], ["", ""], [], []
    num_chunks = 0
    for chunk in stream:
        num_chunks += 1
        assert (chunk.object, chunk.model) == ("chat.completion.chunk", "handbook")
        assert chunk.system_fingerprint == whole.system_fingerprint
        if chunk.usage is not None:
            assert chunk.choices == []
            usages.append(chunk.usage)
        if "foundry" in (chunk.model_extra or {}):
            infos.append(extension(chunk))
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role == "assistant"
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert roles == [1, 1]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert num_chunks > 10
    assert whole.usage is not None
    (usage,) = usages
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert infos[0]["cartridges"] == extension(whole)["cartridges"]


@pytest.mark.parametrize("asked", [{}, {"logprobs": True}, {"extra_body": {"return_token_ids": True}}])
def test_a_chat_stream_begins_with_the_role_and_ends_with_the_reason_alone(
    served: Served, asked: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"model": BASE, "messages": MESSAGES, "max_tokens": 8, "temperature": 0} | asked
    whole = served.client.chat.completions.create(**options).choices[0]
    chunks = [chunk.choices[0] for chunk in served.client.chat.completions.create(stream=True, **options)]
    first, *contents, last = chunks
    assert first.delta.model_dump(exclude_unset=True) == {"role": "assistant", "content": ""}
    assert last.delta.model_dump(exclude_unset=True) == {}
    assert [choice.finish_reason for choice in chunks] == [None] * (len(chunks) - 1) + [whole.finish_reason]
    assert all(set(choice.delta.model_dump(exclude_unset=True)) == {"content"} for choice in contents)
    assert "".join(choice.delta.content or "" for choice in contents) == whole.message.content
    # What goes with tokens goes with the content.
    assert first.logprobs is None
    assert last.logprobs is None
    assert [choice for choice in (first, last) if choice.model_extra] == []
    if whole.logprobs is not None:
        streamed = [token for choice in contents if choice.logprobs for token in choice.logprobs.content or []]
        assert streamed == whole.logprobs.content
    if whole.model_extra:
        ids = [token_id for choice in contents for token_id in (choice.model_extra or {})["token_ids"]]
        assert ids == whole.model_extra["token_ids"]


@pytest.mark.parametrize("last", [True, False])
def test_usage_comes_with_every_chunk_when_asked_for(served: Served, last: bool) -> None:
    options: dict[str, Any] = {"continuous_usage_stats": True, "include_usage": last}
    turn = len(served.template.prompt(MESSAGES))
    asked: dict[str, Any] = {"stream_options": options, "n": 2, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
    chunks = list(served.client.chat.completions.create(model=BASE, messages=MESSAGES, stream=True, **asked))
    usages = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert len(usages) == len(chunks)
    assert {usage.prompt_tokens for usage in usages} == {turn}
    spent = [usage.completion_tokens for usage in usages]
    assert spent == sorted(spent)
    # The first chunk has the role alone.
    assert (spent[0], spent[-1]) == (0, 16)
    assert all(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens for usage in usages)
    assert (not chunks[-1].choices) == last


def test_a_stream_without_include_usage_has_none(served: Served) -> None:
    chunks = list(served.client.chat.completions.create(model=BASE, messages=MESSAGES, stream=True, max_tokens=3))
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)


def test_choices_are_the_answers_of_consecutive_seeds(served: Served) -> None:
    three = chat(served, n=3, seed=40, temperature=1.0, max_tokens=16)
    alone = [chat(served, seed=40 + index, temperature=1.0, max_tokens=16).choices[0] for index in range(3)]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert [choice.message.content for choice in three.choices] == [choice.message.content for choice in alone]
    assert three.usage is not None
    assert three.usage.prompt_tokens == len(served.template.prompt(MESSAGES))


def test_an_answer_ends_before_a_stop_string(served: Served) -> None:
    full = chat(served, max_tokens=40).choices[0]
    text = full.message.content
    assert text is not None
    stop = text[len(text) // 2 :][:3]
    for value in (stop, [stop, "never in it"]):
        stopped = chat(served, max_tokens=40, stop=value).choices[0]
        assert stopped.message.content == text[: text.index(stop)]
        assert stopped.finish_reason == "stop"


def test_length_and_its_two_names(served: Served) -> None:
    answer = chat(served, max_tokens=5, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (5, "length")
    newer = chat(served, max_tokens=5, max_completion_tokens=7, extra_body={"ignore_eos": True})
    assert newer.usage is not None
    assert newer.usage.completion_tokens == 7


@pytest.mark.parametrize("behind", [False, True])
def test_a_chat_takes_what_is_left_of_the_context(served: Served, behind: bool) -> None:
    options: dict[str, Any] = {"model": "handbook@1" if behind else BASE, "max_tokens": None}
    answer = chat(served, **options, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    # 12 tokens of the cartridge count towards the model's context of 512.
    assert answer.usage.total_tokens == 512 - 12 * behind
    assert answer.choices[0].finish_reason == "length"


def test_what_exceeds_the_context_is_refused_by_name_with_openais_code(served: Served) -> None:
    long = "The harbour is open again. " * 100
    messages = [{"role": "user", "content": long}]
    ids, num_chat = [40] * 512, len(served.template.prompt(messages))
    complete = served.client.completions.create
    for call, param, message in (
        (lambda: chat(served, max_tokens=None, messages=messages), "messages", rf" {num_chat} .* 512 "),
        (lambda: chat(served, max_tokens=1, messages=messages), "messages", rf" {num_chat} .* 512 "),
        (lambda: chat(served, messages=[{"role": "user", "content": long * 20}]), "messages", r"at least \d+ .* 512 "),
        (lambda: complete(model=BASE, prompt=ids), "prompt", " 512 tokens leaves .* 512 "),
        (lambda: complete(model=BASE, prompt=[long]), "prompt", r" \d+ tokens leaves .* 512 "),
        (
            lambda: complete(model=BASE, prompt=ids[:500], max_tokens=13),
            "max_tokens",
            " 500 .* max_tokens of 13 .* 512 ",
        ),
        (lambda: complete(model="handbook@1", prompt=ids[:500]), "prompt", "cartridges of 12 tokens .* 500 .* 512 "),
        (lambda: chat(served, max_completion_tokens=600), "max_completion_tokens", "max_completion_tokens of 600"),
    ):
        with pytest.raises(openai.BadRequestError, match=message) as raised:
            call()
        assert (raised.value.param, raised.value.code) == (param, "context_length_exceeded")
        assert "maximum context length is" in str(raised.value)


def test_chat_logprobs_are_those_of_the_offline_model(served: Served) -> None:
    answer = chat(served, model="handbook@1", max_tokens=6, logprobs=True, top_logprobs=3)
    choice = answer.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    turn = served.template.turn(MESSAGES)
    ids = served.stack.greedy(turn, [served.cartridges[0]], 6)
    assert len(choice.logprobs.content) == len(ids)
    hidden = served.stack.lm.packed_hidden([[*turn, *ids]], [served.cartridges[0].kv_L2GPD])
    expected = torch.log_softmax(served.stack.lm.logits(hidden), dim=-1)[len(turn) - 1 : -1]
    for token, row, token_id in zip(choice.logprobs.content, expected, ids, strict=True):
        assert token.logprob == pytest.approx(row[token_id].item(), abs=1e-4)
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        # Greedy: the sampled token leads.
        assert token.top_logprobs[0].token == token.token
    spelled = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
    assert choice.message.content is not None
    assert spelled.decode(errors="replace").startswith(choice.message.content)
    assert spelled


def test_no_logprobs_unless_asked_and_no_alternatives_unless_asked(served: Served) -> None:
    assert chat(served).choices[0].logprobs is None
    logprobs = chat(served, logprobs=True).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert all(token.top_logprobs == [] and token.logprob <= 0 for token in logprobs.content)


def test_models_are_the_base_model_and_every_cartridge(served: Served) -> None:
    listed = {model.id: model for model in served.client.models.list()}
    assert set(listed) == {BASE, "handbook", "acme/manual"}
    assert listed["handbook"].model_extra is not None
    assert listed["handbook"].model_extra["parent"] == BASE
    assert listed["handbook"].model_extra["root"] == "handbook@2"
    assert listed["handbook"].object == "model"
    for model in (BASE, "handbook@good", "acme/manual"):
        assert served.client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("handbook@3")


def test_a_tenants_cartridge_is_a_model(served: Served) -> None:
    answer = chat(served, model="acme/manual@1")
    assert extension(answer)["cartridges"] == [{"name": "acme/manual", "version": 1, "digest": served.tenant.digest}]


@pytest.mark.parametrize(
    ("model", "code"),
    [
        ("gpt-5", "CARTRIDGE_NOT_FOUND"),
        ("handbook@3", "CARTRIDGE_NOT_FOUND"),
        ("handbook@nightly", "CARTRIDGE_NOT_FOUND"),
        ("handbook@blake3:" + "0" * 64, "CARTRIDGE_NOT_FOUND"),
        ("No Such Model", "MODEL_NOT_FOUND"),
    ],
)
def test_unknown_models_are_not_found(served: Served, model: str, code: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as raised:
            served.client.chat.completions.create(model=model, messages=MESSAGES, stream=stream)
        assert (raised.value.param, raised.value.code, raised.value.type) == ("model", code, "invalid_request_error")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "audio": {"id": "a"}}]}, "messages.0.audio"),
        ({"messages": [{"role": "user", "content": "x"} | {f"k{n}": 0 for n in range(300)}]}, "messages.0"),
        ({"messages": [{"role": "system", "content": 'Be <cartridge>{"id": "a"}</cartridge>.'}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"extra_body": {"guided_yaml": {}}}, "guided_yaml"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(served: Served, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        chat(served, **options)
    assert raised.value.param == param
    assert param.split(".")[0] in str(raised.value)
    assert raised.value.type == "invalid_request_error"


def test_top_logprobs_without_logprobs_are_refused(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        chat(served, top_logprobs=2)
    assert raised.value.param == "top_logprobs"


def test_values_that_change_nothing_are_taken(served: Served) -> None:
    plain = chat(served).choices[0].message.content
    same = chat(
        served,
        user="somebody",
        metadata={"a": "b"},
        store=False,
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        service_tier="auto",
        top_p=None,
        extra_body={"top_k": -1, "min_p": 0},
    )
    assert same.choices[0].message.content == plain


def test_answers_and_lists_of_parts_can_be_sent_back(served: Served) -> None:
    first = chat(served).choices[0].message
    following = [*MESSAGES, first.model_dump(), {"role": "user", "content": [{"type": "text", "text": "And then?"}]}]
    plain = [
        *MESSAGES,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": "And then?"},
    ]
    assert chat(served, messages=following).choices[0].message.content == (
        chat(served, messages=plain).choices[0].message.content
    )
