"""How a sequence ends, and what is in its ids and in its text."""

from __future__ import annotations

from dataclasses import replace

import pytest

from foundry.model.lm import FrozenLM
from services.rollout.engine import FinishReason
from tests.unit.engine.bench import Bench, ids_of, request


def test_length(lm: FrozenLM) -> None:
    for num_tokens in (1, 2, 9):
        outputs = Bench(lm).run({0: request(5, max_new_tokens=num_tokens)})[0]
        assert [output.finish_reason for output in outputs] == [None] * (num_tokens - 1) + [FinishReason.LENGTH]


def test_text_is_that_of_the_ids(lm: FrozenLM) -> None:
    for seed in range(10):
        outputs = Bench(lm).run({0: request(5, max_new_tokens=30, seed=seed)})[0]
        text = lm.tokenizer.decode(ids_of(outputs), skip_special_tokens=True)
        assert "".join(output.text for output in outputs) == text


def test_eos_ends_a_sequence_and_is_among_its_ids(lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(5, max_new_tokens=20)
    everything = Bench(lm).run({0: asked})[0]
    # A random model hardly ever ends by itself: let it end with what it says.
    eos = everything[7].token_id
    end = ids_of(everything).index(eos)
    monkeypatch.setattr(lm, "eos_ids", frozenset({eos}))
    outputs = Bench(lm).run({0: replace(asked, sampling=replace(asked.sampling, ignore_eos=False))})[0]
    assert ids_of(outputs) == ids_of(everything)[: end + 1]
    assert [output.finish_reason for output in outputs] == [None] * end + [FinishReason.STOP]
    # Not text.
    assert "".join(each.text for each in outputs) == lm.tokenizer.decode(ids_of(outputs)[:-1], skip_special_tokens=True)
    ignoring = Bench(lm).run({0: asked})[0]
    assert ids_of(ignoring) == ids_of(everything)


def test_stop_string_ends_a_sequence_and_is_not_in_its_text(lm: FrozenLM) -> None:
    asked = request(5, max_new_tokens=60, seed=3)
    everything = Bench(lm).run({0: asked})[0]
    text = "".join(output.text for output in everything)
    # Several tokens long, and the first of its kind.
    stop = text[20:26]
    assert len(lm.tokenizer(stop)["input_ids"]) > 1
    outputs = Bench(lm).run({0: replace(asked, sampling=replace(asked.sampling, stop=("never", stop)))})[0]
    assert "".join(output.text for output in outputs) == text[: text.index(stop)]
    assert outputs[-1].finish_reason is FinishReason.STOP
    # The ids are those that were sampled, up to the one that completed the stop string.
    assert ids_of(outputs) == ids_of(everything)[: len(outputs)]
    assert stop in lm.tokenizer.decode(ids_of(outputs))
    assert stop not in lm.tokenizer.decode(ids_of(outputs)[:-1])
