"""The engine's numbers are those of plain forwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from foundry.model.lm import FrozenLM
from services.rollout.engine.torch.attention import attend_part, attend_part_plain
from tests.unit.engine.bench import CHUNK, SIZES, TOLERANCE, Bench, ids_of, logprobs_of, make_kv, request


@pytest.mark.parametrize("p", SIZES)
def test_logprobs_are_those_of_a_plain_forward(any_lm: FrozenLM, p: int) -> None:
    bench = Bench(any_lm, max_sequences=3)
    bench.load("a", make_kv(any_lm, p))
    requests = {n: request(n, "a", seed=n) for n in (1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1)}
    for key, outputs in bench.run(requests).items():
        assert len(outputs) == 8
        bench.check(requests[key], outputs)


def test_all_logprobs_of_a_token_are_told_raw(lm: FrozenLM) -> None:
    bench = Bench(lm)
    bench.load("a", make_kv(lm, 16))
    asked = request(20, "a", temperature=0.3, top_k=3, num_logprobs=20)
    outputs = bench.run({0: asked})[0]
    expected = torch.topk(bench.expected_logprobs(asked, ids_of(outputs)), 20)
    found = torch.tensor([[logprob for _, logprob in output.top_logprobs] for output in outputs])
    torch.testing.assert_close(found, expected.values, atol=TOLERANCE, rtol=0)
    assert [[token_id for token_id, _ in output.top_logprobs] for output in outputs] == expected.indices.tolist()


def test_cartridges_versions_lists_and_none_in_one_batch(any_lm: FrozenLM) -> None:
    bench = Bench(any_lm, max_sequences=5)
    for p in SIZES:
        bench.load(f"{p}@1", make_kv(any_lm, p))
        bench.load(f"{p}@2", make_kv(any_lm, p, seed=1))
    uses = [
        (),
        ("16@1",),
        ("16@2",),
        ("64@1",),
        ("1@1", "17@2"),
        ("17@2",),
        ("17@2", "1@1"),
        (),
        ("15@1", "16@1", "64@2"),
    ]
    requests = {index: request(12 + 3 * index, *use, seed=index) for index, use in enumerate(uses)}
    outputs = bench.run(requests)
    for index, use in enumerate(uses):
        bench.check(requests[index], outputs[index])
        assert {output.digests for output in outputs[index]} == {use}
        assert {output.cartridge_tokens for output in outputs[index]} == {sum(bench.kv[n].shape[3] for n in use)}
    # The check can fail: the other version gives other numbers.
    other = bench.expected_logprobs(replace(requests[1], digests=("16@2",)), ids_of(outputs[1]))
    chosen = other.gather(1, torch.tensor(ids_of(outputs[1]))[:, None])[:, 0]
    assert (chosen - torch.tensor(logprobs_of(outputs[1]))).abs().max() > 0.1


def test_a_narrower_cartridge_is_widened_exactly(lm: FrozenLM) -> None:
    bench = Bench(lm)
    narrow = make_kv(lm, 17).to(torch.bfloat16)
    bench.load("a", narrow)
    bench.kv["a"] = narrow.float()
    asked = request(20, "a")
    bench.check(asked, bench.run({0: asked})[0])


def test_the_kernel_and_the_plain_formula_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 16, generator=generator) for n in (5, 33, 33))
    mask = torch.zeros(3, 1, 5, 33)
    mask[1, :, :, 20:] = -torch.inf
    for given in (None, mask):
        found, expected = attend_part(q, k, v, given, 0.25), attend_part_plain(q, k, v, given, 0.25)
        torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=0)
