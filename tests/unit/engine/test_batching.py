"""Sequences side by side: neighbours change nothing, arrivals and cancellations leave no trace."""

from __future__ import annotations

import itertools
import random

import pytest

from foundry.model.lm import FrozenLM
from services.rollout.engine import SequenceRequest, TokenOutput
from services.rollout.engine.torch import attention
from services.rollout.engine.torch.attention import StepAttention
from tests.unit.engine.bench import (
    CHUNK,
    SIZES,
    TOLERANCE,
    Bench,
    Outputs,
    bits,
    ids_of,
    logprobs_of,
    make_kv,
    random_ids,
    request,
)


def test_neighbours_and_order_of_arrival_change_nothing(lm: FrozenLM) -> None:
    bench = Bench(lm, max_sequences=4)
    bench.load("a", make_kv(lm, 17))
    bench.load("b", make_kv(lm, 64))
    uses: list[tuple[str, ...]] = [("a",), ("b",), (), ("a", "b"), ("a",), ("b",)]
    requests = {
        index: request(
            9 + 7 * index, *use, seed=index, temperature=0, max_new_tokens=4 + 3 * index, skip_prefix_cache=True
        )
        for index, use in enumerate(uses)
    }
    alone: Outputs = {}
    for key in requests:
        alone |= bench.run({key: requests[key]})
    together = bench.run(requests)
    backwards = bench.run({key: requests[key] for key in reversed(requests)})
    staggered: Outputs = {key: [] for key in requests}
    for key in requests:
        bench.engine.admit({key: requests[key]})
        for output in [*bench.engine.step(), *bench.engine.step()]:
            staggered[output.sequence_id].append(output)
    for key, rest in bench.finish(requests).items():
        staggered[key] += rest
    for other in (together, backwards, staggered):
        for key in requests:
            assert ids_of(other[key]) == ids_of(alone[key])
            assert logprobs_of(other[key]) == pytest.approx(logprobs_of(alone[key]), abs=TOLERANCE)


def test_churn(lm: FrozenLM) -> None:
    """Arrivals and cancellations at random: slots get holes, prefixes are reused, and every number stays right."""
    generator = random.Random(0)
    bench = Bench(lm, max_sequences=6)
    for p in SIZES:
        bench.load(str(p), make_kv(lm, p))
    requests: dict[int, SequenceRequest] = {}
    outputs: dict[int, list[TokenOutput]] = {}
    cancelled = set()
    for key in range(60):
        # Few distinct prompts, so that many have a common beginning.
        prompt = random_ids(40, seed=generator.randrange(3))[: generator.randrange(1, 40)]
        use = [str(p) for p in generator.sample(SIZES, k=generator.randrange(3))]
        requests[key] = request(prompt, *use, seed=key, max_new_tokens=generator.randrange(1, 12))
        bench.engine.admit({key: requests[key]})
        outputs[key] = []
        if generator.random() < 0.3:
            cancelled.add(victim := generator.randrange(key + 1))
            bench.engine.cancel(victim)
        for output in bench.engine.step():
            outputs[output.sequence_id].append(output)
    for key, rest in bench.finish(requests).items():
        outputs[key] += rest
    reused = 0
    for key in requests:
        if outputs[key]:
            bench.check(requests[key], outputs[key])
            reused += outputs[key][0].cached_tokens > 0
        if key not in cancelled:
            assert len(outputs[key]) == requests[key].sampling.max_new_tokens
    assert reused > 10


def test_equal_batches_give_equal_bits(lm: FrozenLM) -> None:
    bench = Bench(lm, max_sequences=3)
    bench.load("a", make_kv(lm, 64))
    batch = {index: request(5 + 9 * index, "a", seed=index, skip_prefix_cache=True) for index in range(7)}
    first = bits(bench.run(batch))
    assert bits(bench.run(batch)) == first
    # Other traffic leaves other tokens in the slots, and frees them in another order.
    bench.run({10 + index: request(30 - index, "a", seed=50 + index, max_new_tokens=9 - index) for index in range(5)})
    bench.engine.admit({20: request(30), 21: request(9)})
    bench.engine.step()
    bench.engine.cancel(20)
    bench.engine.cancel(21)
    assert bits(bench.run(batch)) == first
    # A cartridge that was dropped and loaded again.
    bench.engine.unload("a")
    bench.load("a", make_kv(lm, 64))
    assert bits(bench.run(batch)) == first


def test_cancelling_frees_the_slot_before_the_next_step(lm: FrozenLM) -> None:
    bench = Bench(lm, max_sequences=1)
    bench.engine.admit({0: request(8, max_new_tokens=100), 1: request(8, seed=1, max_new_tokens=100), 2: request(8)})
    assert [output.sequence_id for output in bench.engine.step()] == [0]
    bench.engine.cancel(0)
    assert [output.sequence_id for output in bench.engine.step()] == [1]
    # Also in the middle of a prompt, and while it waits.
    bench.engine.admit({3: request(2 * CHUNK + 1, seed=3)})
    bench.engine.cancel(2)
    bench.engine.cancel(1)
    assert bench.engine.step() == []
    assert bench.engine.stats().num_running == 1
    bench.engine.cancel(3)
    bench.engine.cancel(3)
    assert (bench.engine.stats().num_running, bench.engine.stats().num_waiting) == (0, 0)
    asked = request(8, seed=4)
    bench.check(asked, bench.run({4: asked})[4])


def test_long_prompts_do_not_stall_decoding(lm: FrozenLM) -> None:
    bench = Bench(lm)
    bench.engine.admit({0: request(4, max_new_tokens=30)})
    bench.engine.step()
    bench.engine.admit({1: request(5 * CHUNK, max_new_tokens=1)})
    steps = [[output.sequence_id for output in bench.engine.step()] for _ in range(5)]
    assert steps == [[0], [0], [0], [0], [0, 1]]


def test_decoding_sequences_in_neighbouring_slots_are_read_as_one(lm: FrozenLM) -> None:
    bench = Bench(lm, max_sequences=4)
    bench.engine.admit({index: request(3, seed=index, max_new_tokens=50) for index in range(4)})
    bench.engine.step()
    # The newest comes into the first slot.
    bench.engine.cancel(0)
    bench.engine.admit({4: request(3, seed=4, max_new_tokens=50)})
    bench.engine.step()
    batch = bench.engine._scheduler.schedule()
    assert [sequence.id for sequence, _ in batch] == [4, 1, 2, 3]
    assert len(StepAttention(bench.engine._kv, batch, num_heads=4)._own) == 1


def test_short_sequences_are_not_read_as_long_as_their_neighbour(lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(lm, max_sequences=4)
    requests = {index: request(CHUNK if index == 2 else 1, seed=index, max_new_tokens=6) for index in range(4)}
    one_key = bench.engine._kv.token_bytes // len(bench.engine._kv.layers)
    monkeypatch.setattr(attention, "_PADDING_BYTES", 4 * one_key)
    bench.engine.admit(requests)
    first = [output for _ in range(2) for output in bench.engine.step()]
    batch = bench.engine._scheduler.schedule()
    parts = StepAttention(bench.engine._kv, batch, num_heads=4)._own
    assert [part._slots for part in parts] == [slice(0, 2), slice(2, 3), slice(3, 4)]
    outputs = bench.finish(requests)
    for index, asked in requests.items():
        bench.check(asked, [output for output in first if output.sequence_id == index] + outputs[index])


def test_counter_of_ids_is_the_callers(lm: FrozenLM) -> None:
    bench = Bench(lm)
    keys = itertools.islice(itertools.count(1000, 7), 3)
    assert set(bench.run({key: request(5) for key in keys})) == {1000, 1007, 1014}
