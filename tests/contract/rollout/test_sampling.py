"""Scored prompts, answers held to a grammar, and what a batch does not take."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from foundry.errors import InvalidArgument
from foundry.model.cartridge import Cartridge
from foundry.v1 import rollout_pb2
from tests.contract.rollout.server import Rollout, joined

PROMPT = [5, 6, 7, 8, 9, 40, 300]


def plain_logprobs(directory: Path, ids: list[int], cartridge: Cartridge | None) -> torch.Tensor:
    """By `transformers` alone: of each token after the first, over the whole vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    past = DynamicCache()
    begin = 0
    if cartridge is not None:
        begin = cartridge.kv_L2GPD.shape[3]
        for layer, (k_GPD, v_GPD) in enumerate(cartridge.kv_L2GPD):
            past.update(k_GPD[None], v_GPD[None], layer)
    positions = torch.arange(begin, begin + len(ids))[None]
    with torch.no_grad():
        out = model(torch.tensor([ids]), past_key_values=past, position_ids=positions)
    return torch.log_softmax(out.logits[0], dim=-1)[:-1]


@pytest.mark.parametrize("behind", [False, True])
async def test_scores_are_those_of_transformers(rollout: Rollout, directory: Path, behind: bool) -> None:
    named = [rollout.publish(0)] if behind else []
    cartridge = Cartridge.from_bytes(rollout.source.cartridges[named[0].digest]) if behind else None
    expected = plain_logprobs(directory, PROMPT, cartridge)
    # The second time everything could be cached.
    for _ in range(2):
        asked = rollout.request(PROMPT, cartridges=named, sampling={"max_new_tokens": 0, "prompt_logprobs": 2})
        (chunk,) = await rollout.generate(asked)
        assert list(chunk.ids) == []
        assert chunk.text == ""
        assert chunk.finish_reason == rollout_pb2.FINISH_REASON_LENGTH
        assert (chunk.usage.prompt_tokens, chunk.usage.completion_tokens) == (len(PROMPT), 0)
        assert [each.digest for each in chunk.identity.cartridges] == [each.digest for each in named]
        scores = chunk.prompt_logprobs
        assert list(scores.ids) == PROMPT
        assert math.isnan(scores.logprobs[0])
        chosen = expected.gather(1, torch.tensor(PROMPT[1:])[:, None])
        assert scores.logprobs[1:] == pytest.approx(chosen[:, 0].tolist(), abs=1e-3)
        assert list(scores.ranks)[1:] == ((expected > chosen).sum(dim=-1) + 1).tolist()
        assert list(scores.top_ids)[2:] == expected.topk(2).indices.flatten().tolist()
        assert scores.top_logprobs[2:] == pytest.approx(expected.topk(2).values.flatten().tolist(), abs=1e-3)


@pytest.mark.parametrize(
    "sampling",
    [
        {"min_p": 0.1},
        {"min_tokens": 2},
        {"logit_bias": {5: 1.0}},
        {"presence_penalty": 1.0},
        {"frequency_penalty": 1.0},
        {"repetition_penalty": 1.5},
        {"grammar": rollout_pb2.Grammar(regex="a")},
        {"prompt_logprobs": 1},
    ],
)
async def test_what_is_trained_on_is_the_policys(rollout: Rollout, sampling: dict[str, Any]) -> None:
    """Batches are what trainers ask for."""
    request = rollout.request(sampling={"ignore_eos": False, **sampling})
    assert await rollout.generate(request)
    with pytest.raises(InvalidArgument) as caught:
        await rollout.batch([rollout.request(), request])
    assert caught.value.field == f"requests[1].sampling.{next(iter(sampling))}"


@pytest.mark.parametrize(
    ("grammar", "answers"),
    [
        (rollout_pb2.Grammar(choice=rollout_pb2.Choice(texts=["yes", 'no, "never"', "é ::= ü"])), None),
        (rollout_pb2.Grammar(regex="[a-c]{2}/[0-9]"), None),
        (rollout_pb2.Grammar(lark='start: "a" | "b" "c"'), {"a", "bc"}),
        (rollout_pb2.Grammar(lark='root ::= "a" | "b" "c"'), {"a", "bc"}),
        (rollout_pb2.Grammar(json_schema='{"const": {"a": [1, null]}}'), None),
    ],
)
async def test_answers_are_sentences_of_the_language_and_end_with_it(
    rollout: Rollout, grammar: rollout_pb2.Grammar, answers: set[str] | None
) -> None:
    sampling = {"grammar": grammar, "ignore_eos": False, "max_new_tokens": 100, "n": 4}
    chunks = await rollout.generate(rollout.request(sampling=sampling))
    for index in range(4):
        ids, logprobs, text = joined(chunks, index)
        assert len(logprobs) == len(ids)
        (reason,) = (each.finish_reason for each in chunks if each.index == index and each.finish_reason)
        assert reason == rollout_pb2.FINISH_REASON_STOP
        match grammar.WhichOneof("language"):
            case "choice":
                assert text in grammar.choice.texts
            case "json_schema":
                assert json.loads(text) == {"a": [1, None]}
            case "regex":
                assert len(text) == 4
                assert text[2] == "/"
            case _:
                assert answers is not None
                assert text in answers


@pytest.mark.parametrize(
    "grammar",
    [
        rollout_pb2.Grammar(),
        rollout_pb2.Grammar(json_schema="{"),
        rollout_pb2.Grammar(json_schema="[1]"),
        rollout_pb2.Grammar(json_schema='{"type": "nothing"}'),
        rollout_pb2.Grammar(json_schema='{"$ref": "http://169.254.169.254/"}'),
        rollout_pb2.Grammar(json_schema='{"items":' * 500 + "{}" + "}" * 500),
        rollout_pb2.Grammar(json_schema=json.dumps({"enum": ["x" * 70_000]})),
        rollout_pb2.Grammar(regex="("),
        rollout_pb2.Grammar(regex="(" * 20_000),
        rollout_pb2.Grammar(lark="("),
        rollout_pb2.Grammar(regex="(((a{100}){100}){100}){100}"),
        rollout_pb2.Grammar(json_schema='{"type": "integer", "multipleOf": 99999989}'),
        rollout_pb2.Grammar(choice=rollout_pb2.Choice()),
        rollout_pb2.Grammar(choice=rollout_pb2.Choice(texts=[""])),
    ],
)
async def test_a_grammar_that_cannot_be_is_refused(rollout: Rollout, grammar: rollout_pb2.Grammar) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await rollout.generate(rollout.request(sampling={"grammar": grammar, "ignore_eos": False}))
    assert caught.value.field == "sampling.grammar"
    assert len(str(caught.value)) < 1000
    # The next one is not harmed.
    sampling = {"grammar": rollout_pb2.Grammar(regex="ab"), "ignore_eos": False}
    assert joined(await rollout.generate(rollout.request(sampling=sampling)))[2] == "ab"
