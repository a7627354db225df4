"""Steps as a GPU takes them, computed by Triton's interpreter: the same tables and kernels, launched one by one.

Slow as that is, models and splits are the smallest that have every case.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foundry.model.lm import FrozenLM
from services.rollout.engine import SequenceRequest
from tests.unit.engine.bench import TOLERANCE, Bench, ids_of, make_kv, request

pytest.importorskip("triton")

CHUNK = 8


@pytest.fixture
def bench(lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> Bench:
    from services.rollout.engine.torch.cuda import attention
    from services.rollout.engine.torch.cuda.runner import CapturedRunner

    monkeypatch.setattr(attention, "_splits", lambda num_programs: 2)
    bench = Bench(lm, max_sequences=2, max_sequence_tokens=32)
    engine: Any = bench.engine
    engine._scheduler._prefill_tokens_per_step = CHUNK
    with torch.inference_mode():
        engine._runner = CapturedRunner(lm, engine._kv, prefill_tokens_per_step=CHUNK, capture=False)
    for index, num_tokens in enumerate((65, 3, 1, 2, 1)):
        bench.load(f"c{index}", make_kv(lm, num_tokens, index))
    return bench


@pytest.mark.parametrize(
    "requests",
    [
        pytest.param(
            [request(9, "c0", seed=1, max_new_tokens=3), request(2, "c0", seed=2, max_new_tokens=4)], id="shared"
        ),
        pytest.param(
            [request(3, seed=1, max_new_tokens=2), request(4, "c0", "c1", max_new_tokens=2)], id="list and none"
        ),
        pytest.param([request(2, *(f"c{index}" for index in range(5)), max_new_tokens=2)], id="more than is captured"),
        pytest.param(
            [request(2, "c1", temperature=0.0, max_new_tokens=3), request(3, "c1", top_p=0.5, max_new_tokens=3)],
            id="greedy and filtered",
        ),
        pytest.param([request(1, seed=seed, max_new_tokens=2) for seed in range(3)], id="more than places"),
    ],
)
def test_logprobs_are_those_of_a_plain_forward(bench: Bench, requests: list[SequenceRequest]) -> None:
    numbered = dict(enumerate(requests))
    outputs = bench.run(numbered)
    for index, asked in numbered.items():
        assert len(outputs[index]) == asked.sampling.max_new_tokens
        bench.check(asked, outputs[index])


def test_what_is_cancelled_while_it_computes_says_no_more(bench: Bench) -> None:
    kept, left, late = (request(2, seed=seed, max_new_tokens=4) for seed in range(3))
    bench.engine.admit({0: kept, 1: left})
    assert bench.engine.step() == []
    bench.engine.cancel(1)
    # It gets the place at once.
    bench.engine.admit({2: late})
    outputs = bench.finish([0, 1, 2])
    assert outputs[1] == []
    bench.check(kept, outputs[0])
    bench.check(late, outputs[2])


def test_an_end_is_seen_one_step_late_and_nothing_follows_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(2, seed=3, max_new_tokens=6, ignore_eos=False)
    every = [output.token_id for output in bench.run({0: asked})[0]]
    monkeypatch.setattr(bench.lm, "eos_ids", frozenset({every[2]}))
    outputs = bench.run({1: asked})[1]
    assert [output.token_id for output in outputs] == every[: every.index(every[2]) + 1]
    assert outputs[-1].finish_reason == "stop"
    # What stayed in its place is right: a conversation goes on there.
    more = request((*asked.prompt_ids, *every[:2], 5), max_new_tokens=2)
    answer = bench.run({2: more})[2]
    assert answer[0].cached_tokens >= 2
    bench.check(more, answer)


def test_a_third_of_a_step_at_most_is_padding() -> None:
    from services.rollout.engine.torch.cuda.runner import _sizes

    sizes = list(_sizes(1, 100))
    assert sizes == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100]
    assert list(_sizes(1, 1)) == [1]
    for number in range(1, 101):
        assert next(size for size in sizes if size >= number) < 1.5 * number


def test_prompts_are_scored_and_logits_adjusted_as_elsewhere(bench: Bench, lm: FrozenLM) -> None:
    asked = request(
        10,
        "c1",
        temperature=0.0,
        num_prompt_logprobs=2,
        max_new_tokens=3,
        logit_bias=((9, 50.0),),
        presence_penalty=2.0,
    )
    elsewhere = Bench(lm, max_sequences=2, max_sequence_tokens=32)
    elsewhere.load("c1", bench.kv["c1"])
    beside = request(3, seed=1, max_new_tokens=3)
    answers, expected_answers = (each.run({0: asked, 1: beside}) for each in (bench, elsewhere))
    here, there = answers[0], expected_answers[0]
    assert ids_of(here) == ids_of(there)
    assert ids_of(answers[1]) == ids_of(expected_answers[1])
    scored, expected = here[0].prompt_logprobs, there[0].prompt_logprobs
    assert scored is not None
    assert expected is not None
    torch.testing.assert_close(scored.logprobs_n, expected.logprobs_n, atol=TOLERANCE, rtol=0)
    assert scored.top_ids_nK.tolist() == expected.top_ids_nK.tolist()
