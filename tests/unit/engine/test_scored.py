"""Logprobs of prompts against plain forwards."""

from __future__ import annotations

import pytest
import torch

from foundry.model.lm import FrozenLM
from services.rollout.engine.torch import scoring
from tests.unit.engine.bench import TOLERANCE, Bench, make_kv, request


@pytest.fixture
def bench(lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> Bench:
    # Three rows at a time, in steps of 16 tokens.
    monkeypatch.setattr(scoring, "_MAX_LOGITS", 3 * lm.spec.vocab_size)
    bench = Bench(lm, max_sequences=4, max_sequence_tokens=48)
    bench.load("c", make_kv(lm, 5))
    return bench


@pytest.mark.parametrize("digests", [(), ("c",)])
def test_every_prompt_token_is_scored_also_where_its_kv_is_there(bench: Bench, digests: tuple[str, ...]) -> None:
    asked = {0: request(21, *digests, num_prompt_logprobs=3, max_new_tokens=2)}
    asked[1] = request(1, *digests, num_prompt_logprobs=0, max_new_tokens=1)
    asked[2] = request(5, *digests, seed=1, max_new_tokens=3)
    first = bench.run(asked)
    # Whatever the prefix cache holds now.
    again = bench.run({4: asked[0]})[4]
    assert again[0].cached_tokens == 0
    prefix = torch.cat([bench.kv[name] for name in digests], dim=3) if digests else None
    prompt = asked[0].prompt_ids
    with torch.no_grad():
        expected = torch.log_softmax(bench.lm.logits(bench.lm.packed_hidden([prompt], [prefix])), dim=-1)[:-1]
    chosen = expected.gather(1, torch.tensor(prompt[1:])[:, None])
    for outputs in (first[0], again):
        scores = outputs[0].prompt_logprobs
        assert scores is not None
        torch.testing.assert_close(scores.logprobs_n, chosen[:, 0], atol=TOLERANCE, rtol=0)
        assert scores.ranks_n.tolist() == ((expected > chosen).sum(dim=-1) + 1).tolist()
        torch.testing.assert_close(scores.top_logprobs_nK, expected.topk(3).values, atol=TOLERANCE, rtol=0)
        assert scores.top_ids_nK.tolist() == expected.topk(3).indices.tolist()
        assert outputs[1].prompt_logprobs is None
        bench.check(asked[0], outputs)
    alone = first[1][0].prompt_logprobs
    assert alone is not None
    assert (len(alone.logprobs_n), alone.top_ids_nK.shape) == (0, (0, 0))
    assert first[2][0].prompt_logprobs is None
    bench.check(asked[2], first[2])
