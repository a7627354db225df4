"""Tokens are drawn as the parameters and the seed say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from foundry.model.lm import FrozenLM
from services.rollout.engine import SamplingParams
from services.rollout.engine.torch.sampler import draw, invert
from tests.unit.engine.bench import Bench, ids_of, random_ids, request


def test_a_seed_decides_the_answer(lm: FrozenLM) -> None:
    bench = Bench(lm)
    prompt = random_ids(10)
    asked = {seed: request(prompt, seed=seed) for seed in (0, 1, 2, 2**64 - 1)}
    answers = {seed: ids_of(bench.run({0: each})[0]) for seed, each in asked.items()}
    assert len({tuple(ids) for ids in answers.values()}) == 4
    together = bench.run(asked)
    assert {seed: ids_of(outputs) for seed, outputs in together.items()} == answers


def test_temperature_0_takes_the_most_likely(lm: FrozenLM) -> None:
    bench = Bench(lm)
    asked = request(10, temperature=0)
    ids = ids_of(bench.run({0: asked})[0])
    assert ids == bench.expected_logprobs(asked, ids).argmax(dim=-1).tolist()
    # Near 0 is the same, not NaN.
    assert ids_of(bench.run({0: replace(asked, sampling=replace(asked.sampling, temperature=1e-40))})[0]) == ids


def direct(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [V], float64, by sorting everything."""
    probs = torch.softmax(logits_V.double() / params.temperature, dim=-1)
    order = probs.argsort(descending=True)
    if params.top_k:
        probs[order[params.top_k :]] = 0
        probs /= probs.sum()
    before = probs[order].cumsum(dim=-1) - probs[order]
    probs[order[before >= params.top_p]] = 0
    return probs / probs.sum()


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.5), (0, 0.95), (40, 0.8), (0, 1e-6), (5000, 0.9)]
)
@pytest.mark.parametrize("temperature", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("vocab_size", [300, 3000])
def test_top_k_and_top_p_against_a_direct_computation(
    top_k: int, top_p: float, temperature: float, vocab_size: int
) -> None:
    params = SamplingParams(max_new_tokens=1, temperature=temperature, top_p=top_p, top_k=top_k)
    logits_V = 2 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(0))
    cdf = direct(logits_V, params).cumsum(dim=-1)
    uniforms = [index / 200 for index in range(200)]
    expected = torch.searchsorted(cdf, torch.tensor(uniforms, dtype=torch.float64), right=True)
    found = draw(logits_V.repeat(200, 1), [params] * 200, uniforms)
    # float32 and float64 may part at the boundary between two tokens, nowhere else.
    assert (found != expected).sum() <= 1
    assert direct(logits_V, params)[found].min() > 0


def test_filters_are_of_their_own_row() -> None:
    logits_NV = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    params = [
        SamplingParams(max_new_tokens=1, top_k=1),
        SamplingParams(max_new_tokens=1),
        SamplingParams(max_new_tokens=1, temperature=2.0, top_p=0.3),
    ]
    for u in (0.0, 0.3, 0.999999):
        expected = [draw(logits_NV[row : row + 1], [params[row]], [u]).item() for row in range(3)]
        assert draw(logits_NV, params, [u] * 3).tolist() == expected
    assert {draw(logits_NV[:1], params[:1], [u]).item() for u in (0.0, 0.5, 0.999)} == {int(logits_NV[0].argmax())}


def test_frequencies_are_the_probabilities(lm: FrozenLM) -> None:
    bench = Bench(lm, max_sequences=32)
    prompt = random_ids(10)
    num_samples = 1024
    requests = {seed: request(prompt, seed=seed, max_new_tokens=1) for seed in range(num_samples)}
    counts = torch.zeros(lm.spec.vocab_size)
    for outputs in bench.run(requests).values():
        counts[outputs[0].token_id] += 1
    probs = bench.expected_logprobs(requests[0], [0]).exp()[0]
    likely = probs > 0.01
    deviation = (counts / num_samples - probs)[likely].abs() / (probs * (1 - probs) / num_samples).sqrt()[likely]
    assert likely.sum() > 5
    assert deviation.max() < 4.5


@pytest.mark.parametrize("uniform", [0.0, 1e-12, 0.25, 0.5, 0.75, 1 - 2**-53])
def test_what_has_no_mass_is_never_drawn(uniform: float) -> None:
    """Masses at both sides of a block's border, at the vocabulary's end, and one after only empty blocks."""
    vocab_size = 1500
    for ids in ([0], [255, 256], [1, 511, 512], [vocab_size - 1], [700, vocab_size - 1]):
        scaled_NV = torch.full((1, vocab_size), float("-inf"))
        scaled_NV[0, ids] = 0.0
        found = invert(scaled_NV, torch.tensor([uniform], dtype=torch.float64)).item()
        assert found == ids[min(int(uniform * len(ids)), len(ids) - 1)]
