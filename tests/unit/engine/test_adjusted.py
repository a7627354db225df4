"""What changes the distribution that tokens are drawn from: each against its definition, token by token."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from foundry.model.lm import FrozenLM
from services.rollout.engine import FinishReason, SamplingParams, SequenceRequest
from services.rollout.engine.torch.adjust import adjusted
from tests.unit.engine.bench import Bench, ids_of, make_kv, random_ids, request

EOS = (2, 0)
ADJUSTED: list[dict[str, Any]] = [
    {"logit_bias": ((7, 100.0), (8, 99.5))},
    {"presence_penalty": 2.0},
    {"frequency_penalty": -2.0},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6, "presence_penalty": -1.0, "frequency_penalty": 2.0},
    {"min_tokens": 5, "ignore_eos": False, "logit_bias": ((EOS[0], 100.0),)},
]


@pytest.fixture
def bench(lm: FrozenLM) -> Bench:
    bench = Bench(lm, max_sequences=4, max_sequence_tokens=48)
    bench.load("c", make_kv(lm, 5))
    return bench


def defined(logprobs_V: Tensor, params: SamplingParams, prompt: tuple[int, ...], answer: list[int]) -> Tensor:
    """What vLLM's documentation says, for one token."""
    logits = logprobs_V.tolist()
    for token, bias in params.logit_bias:
        logits[token] += bias
    if len(answer) < params.min_tokens:
        for token in (*EOS, *params.stop_token_ids):
            logits[token] = -torch.inf
    for token in {*prompt, *answer}:
        logits[token] *= 1 / params.repetition_penalty if logits[token] > 0 else params.repetition_penalty
    for token, count in Counter(answer).items():
        logits[token] -= params.frequency_penalty * count + params.presence_penalty
    return torch.tensor(logits)


@pytest.mark.parametrize("sampling", ADJUSTED, ids=lambda sampling: "+".join(sampling))
def test_tokens_are_drawn_of_the_adjusted_logits_and_told_with_the_models_logprobs(
    bench: Bench, sampling: dict[str, Any]
) -> None:
    """Penalties work on logits, of which logprobs differ by a constant: so the model's logits are looked at."""
    asked = request(6, "c", temperature=0.0, max_new_tokens=12, **sampling)
    beside = request(4, "c", seed=1, max_new_tokens=8)
    outputs = bench.run({0: asked, 1: beside})
    ids = ids_of(outputs[0])
    logits = model_logits(bench, asked, ids)
    for place, token in enumerate(ids):
        expected = defined(logits[place], asked.sampling, asked.prompt_ids, ids[:place])
        assert expected[token] >= expected.max() - 1e-3
    bench.check(asked, outputs[0])
    bench.check(beside, outputs[1])
    assert ids_of(bench.run({2: beside})[2]) == ids_of(outputs[1])
    plain = SequenceRequest(asked.prompt_ids, asked.digests, SamplingParams(12, temperature=0.0, ignore_eos=True))
    assert ids_of(bench.run({3: plain})[3]) != ids


def model_logits(bench: Bench, asked: SequenceRequest, ids: list[int], *, every: bool = False) -> Tensor:
    """Where each of the answer's tokens was drawn; or after each of the prompt's, and of the answer's."""
    prefix = torch.cat([bench.kv[name] for name in asked.digests], dim=3) if asked.digests else None
    with torch.no_grad():
        hidden = bench.lm.packed_hidden([[*asked.prompt_ids, *ids]], [prefix])
        logits = bench.lm.logits(hidden)
    return logits if every else logits[len(asked.prompt_ids) - 1 : -1]


def test_min_p_leaves_out_what_is_less_likely_at_the_temperature(bench: Bench) -> None:
    asked = {
        seed: request(random_ids(6), "c", seed=seed, temperature=1.5, min_p=0.3, max_new_tokens=1) for seed in range(20)
    }
    outputs = bench.run(asked)
    logits = model_logits(bench, asked[0], [], every=True)[-1] / 1.5
    kept = (logits - logits.max()).exp() >= 0.3
    assert 1 < kept.sum() < len(kept)
    assert all(kept[each[0].token_id] for each in outputs.values())


def test_who_wants_nothing_pays_nothing() -> None:
    logits = torch.zeros(2, 8)
    assert adjusted(logits, [None, None]) is logits


def test_stop_tokens_end_an_answer_and_are_not_its_text(bench: Bench) -> None:
    plain = ids_of(bench.run({0: request(6, temperature=0.0)})[0])
    num = plain.index(plain[3])
    stopped = bench.run({1: request(6, temperature=0.0, stop_token_ids=(plain[3],))})[1]
    assert ids_of(stopped) == plain[: num + 1]
    assert stopped[-1].finish_reason is FinishReason.STOP
    assert "".join(each.text for each in stopped) == bench.lm.info.text(plain[:num])


def test_nothing_ends_an_answer_before_min_tokens(bench: Bench) -> None:
    asked: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 10, "min_tokens": 6}
    free = ids_of(bench.run({0: request(6, temperature=0.0, max_new_tokens=10)})[0])
    held = bench.run({1: request(6, stop_token_ids=(free[0],), **asked)})[1]
    assert free[0] not in ids_of(held)[:6]
    # Nor does a stop string in what stands before; in what stands after it does.
    text = bench.lm.info.text(free)
    early, late = bench.lm.info.text(free[:6])[-1], bench.lm.info.text(free[7:])[-1]
    said = bench.run({2: request(6, stop=(early + text[len(bench.lm.info.text(free[:6]))],), **asked)})[2]
    assert ids_of(said) == free
    ended = bench.run({3: request(6, stop=(late,), **asked)})[3]
    assert 6 < len(ended) <= 10
    assert ended[-1].finish_reason is FinishReason.STOP
