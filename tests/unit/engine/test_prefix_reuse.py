"""KV of a common beginning is reused, and only behind the same cartridges."""

from __future__ import annotations

from dataclasses import replace

from foundry.model.lm import FrozenLM
from tests.unit.engine.bench import Bench, Outputs, bits, ids_of, make_kv, random_ids, request


def test_a_conversation_goes_on_where_it_was(lm: FrozenLM) -> None:
    bench = Bench(lm, max_sequences=2)
    bench.load("a", make_kv(lm, 16))
    first = request(20, "a", max_new_tokens=6)
    answer = ids_of(bench.run({0: first})[0])
    # The last token of an answer has not been through the model.
    second = request((*first.prompt_ids, *answer, *random_ids(7)), "a", seed=1)
    outputs = bench.run({1: second})[1]
    assert {output.cached_tokens for output in outputs} == {20 + 5}
    bench.check(second, outputs)
    third = request((*second.prompt_ids[:23], *random_ids(3, seed=9)), "a", seed=2)
    outputs = bench.run({2: third})[2]
    assert outputs[0].cached_tokens == 23
    bench.check(third, outputs)


def test_at_least_one_token_is_computed(lm: FrozenLM) -> None:
    bench = Bench(lm)
    asked = request(20, max_new_tokens=5)
    assert bench.run({0: asked})[0][0].cached_tokens == 0
    outputs = bench.run({1: asked})[1]
    assert outputs[0].cached_tokens == 19
    bench.check(asked, outputs)


def test_a_prefix_is_copied_from_a_running_sequence(lm: FrozenLM) -> None:
    bench = Bench(lm, max_sequences=2)
    bench.load("a", make_kv(lm, 16))
    running = request(30, "a", max_new_tokens=20)
    bench.engine.admit({0: running})
    outputs: Outputs = {0: [], 1: []}
    for _ in range(2):
        outputs[0] += bench.engine.step()
    assert len(outputs[0]) == 1
    other = request((*running.prompt_ids[:25], *random_ids(5)), "a", seed=1, max_new_tokens=20)
    bench.engine.admit({1: other})
    for key, rest in bench.finish([]).items():
        outputs[key] += rest
    assert outputs[1][0].cached_tokens == 25
    bench.check(running, outputs[0])
    bench.check(other, outputs[1])


def test_reuse_of_a_beginning_keeps_the_rest_for_its_own_conversation(lm: FrozenLM) -> None:
    bench = Bench(lm, max_sequences=2)
    old = request(30)
    bench.run({0: old})
    bench.run({1: request((*old.prompt_ids[:5], *random_ids(20)), seed=1)})
    assert bench.run({2: old})[2][0].cached_tokens == 29


def test_different_digests_never_share_a_prefix(lm: FrozenLM) -> None:
    bench = Bench(lm)
    bench.load("report@1", make_kv(lm, 16))
    bench.load("report@2", make_kv(lm, 16, seed=1))
    for key, use in enumerate([("report@1",), ("report@2",), (), ("report@1", "report@2"), ("report@2", "report@1")]):
        asked = request(20, *use)
        outputs = bench.run({key: asked})[key]
        assert outputs[0].cached_tokens == 0
        bench.check(asked, outputs)


def test_tenants_never_share_a_prefix(lm: FrozenLM) -> None:
    """Neither what a slot still holds nor what runs."""
    bench = Bench(lm, max_sequences=3)
    asked = request(20)
    bench.run({0: asked})
    outputs = bench.run({1: replace(asked, tenant="acme"), 2: replace(asked, tenant="umbrella")})
    assert {output.cached_tokens for output in (*outputs[1], *outputs[2])} == {0}
    assert [bench.run({key: replace(asked, tenant="acme")})[key][0].cached_tokens for key in (3, 4)] == [19, 19]


def test_skip_prefix_cache_computes_everything(lm: FrozenLM) -> None:
    bench = Bench(lm)
    asked = request(20)
    first = bits(bench.run({0: asked}))[0]
    outputs = bench.run({1: replace(asked, skip_prefix_cache=True)})
    assert outputs[1][0].cached_tokens == 0
    assert bits(outputs)[1] == first
