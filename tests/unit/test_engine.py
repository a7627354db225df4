"""The torch engine against plain forwards of the same model: numbers, batching, reuse, sampling, endings."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foundry.cartridge import Cartridge
from foundry.lm import FrozenLM
from services.rollout.engine import FinishReason, SamplingParams, SequenceRequest, TokenOutput
from services.rollout.engine.attention import StepAttention, attend_part, attend_part_plain
from services.rollout.engine.sampler import draw
from services.rollout.engine.torch_engine import TorchEngine
from tests.tiny import build_tiny_model

# The engine merges two parts of a softmax, the reference computes it in one.
TOLERANCE = 1e-4
CHUNK = 16
SIZES = (1, 15, 16, 17, 64)
Outputs = dict[int, list[TokenOutput]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only get in each other's way on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def any_lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FrozenLM:
    return FrozenLM.load(build_tiny_model(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> FrozenLM:
    return FrozenLM.load(build_tiny_model(tmp_path_factory.mktemp("model")))


def make_kv(lm: FrozenLM, num_tokens: int, seed: int = 0) -> Tensor:
    spec = lm.spec
    generator = torch.Generator().manual_seed(1000 * num_tokens + seed)
    return torch.randn(spec.num_layers, 2, spec.num_kv_heads, num_tokens, spec.head_dim, generator=generator)


class Bench:
    """An engine, the cartridges in it by name, and what the model says without it."""

    def __init__(self, lm: FrozenLM, max_sequences: int = 8, max_sequence_tokens: int = 128) -> None:
        self.lm = lm
        self.engine = TorchEngine(
            lm,
            max_sequences=max_sequences,
            max_sequence_tokens=max_sequence_tokens,
            prefill_tokens_per_step=CHUNK,
        )
        self.kv: dict[str, Tensor] = {}

    def load(self, name: str, kv: Tensor) -> None:
        self.kv[name] = kv
        self.engine.load(name, Cartridge(self.lm.spec.header(kv.shape[3], 1, kv.dtype), kv))

    def run(self, requests: Mapping[int, SequenceRequest]) -> Outputs:
        self.engine.admit(requests)
        return self.finish(requests)

    def finish(self, sequence_ids: Iterable[int]) -> Outputs:
        outputs: Outputs = {sequence_id: [] for sequence_id in sequence_ids}
        while (stats := self.engine.stats()).num_running or stats.num_waiting:
            for output in self.engine.step():
                outputs.setdefault(output.sequence_id, []).append(output)
        return outputs

    def expected_logprobs(self, request: SequenceRequest, ids: Sequence[int]) -> Tensor:
        """Of the answer `ids`, each over the whole vocabulary, by one forward without the engine."""
        prefix = torch.cat([self.kv[name] for name in request.digests], dim=3) if request.digests else None
        sequence = [*request.prompt_ids, *ids][:-1]
        with torch.no_grad():
            hidden = self.lm.packed_hidden([sequence], [prefix])
            return torch.log_softmax(self.lm.logits(hidden), dim=-1)[len(request.prompt_ids) - 1 :]

    def check(self, request: SequenceRequest, outputs: Sequence[TokenOutput]) -> None:
        expected = self.expected_logprobs(request, ids_of(outputs))
        chosen = expected.gather(1, torch.tensor(ids_of(outputs))[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs_of(outputs)), chosen, atol=TOLERANCE, rtol=0)


def ids_of(outputs: Sequence[TokenOutput]) -> list[int]:
    return [output.token_id for output in outputs]


def logprobs_of(outputs: Sequence[TokenOutput]) -> list[float]:
    return [output.logprob for output in outputs]


def bits(outputs: Outputs) -> dict[int, list[tuple[int, float]]]:
    """Ids and logprobs, to be compared exactly."""
    return {key: [(output.token_id, output.logprob) for output in each] for key, each in outputs.items()}


def random_ids(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    generator = random.Random(1000 * num_tokens + seed)
    return tuple(generator.randrange(3, 384) for _ in range(num_tokens))


def request(
    prompt: int | tuple[int, ...] = 20,
    *digests: str,
    seed: int = 0,
    max_new_tokens: int = 8,
    temperature: float = 1.0,
    skip_prefix_cache: bool = False,
    ignore_eos: bool = True,
    **sampling: Any,
) -> SequenceRequest:
    """A random prompt of so many tokens, or the given one."""
    prompt_ids = random_ids(prompt, seed) if isinstance(prompt, int) else prompt
    params = SamplingParams(
        max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, ignore_eos=ignore_eos, **sampling
    )
    return SequenceRequest(prompt_ids, digests, params, skip_prefix_cache)


# Numbers


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


# Batching


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


def test_every_token_goes_through_the_model_once(lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(lm, max_sequences=3)
    bench.load("a", make_kv(lm, 64))
    widths: list[int] = []
    hidden = lm.hidden

    def counting(ids_T: Tensor, positions_T: Tensor, plan: Any) -> Tensor:
        widths.append(len(ids_T))
        return hidden(ids_T, positions_T, plan)

    monkeypatch.setattr(lm, "hidden", counting)
    requests = {index: request(10 + index, "a", seed=index, max_new_tokens=5 + index) for index in range(5)}
    bench.run(requests)
    # The last sampled token of a sequence never does.
    assert sum(widths) == sum(len(each.prompt_ids) + each.sampling.max_new_tokens - 1 for each in requests.values())
    assert max(widths) <= CHUNK + 3


class _LargeTensors(TorchDispatchMode):
    """Notes every operator whose output is large and lies in memory that is not known."""

    def __init__(self, known: Sequence[Tensor], num_elements: int) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.num_elements = num_elements
        self.found: list[str] = []
        self.num_operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.num_operators += 1
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if (
                isinstance(tensor, Tensor)
                and tensor.numel() >= self.num_elements
                and tensor.untyped_storage().data_ptr() not in self.known
            ):
                self.found.append(str(func))
        return result


def test_neither_prompt_nor_decoding_copies_a_cartridge(lm: FrozenLM) -> None:
    bench = Bench(lm)
    kv = make_kv(lm, 300)
    bench.load("a", kv)
    bench.engine.admit({index: request(CHUNK // 4, "a", seed=index) for index in range(4)})
    loaded = bench.engine._cartridges["a"].kv_L2GPD
    known = [loaded, *lm.model.parameters(), bench.engine._kv.layers[0][0]]
    one_layer = kv[0, 0].numel()
    for _ in ("prefill", "decode"):
        with _LargeTensors(known, one_layer) as seen:
            assert len(bench.engine.step()) == 4
        assert seen.num_operators > 50
        assert seen.found == []
    # The detector sees a copy.
    with _LargeTensors(known, one_layer) as seen:
        torch.cat([loaded[0, 0], loaded[0, 0]], dim=1)
    assert seen.found


# Prefix reuse


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


def test_skip_prefix_cache_computes_everything(lm: FrozenLM) -> None:
    bench = Bench(lm)
    asked = request(20)
    first = bits(bench.run({0: asked}))[0]
    outputs = bench.run({1: replace(asked, skip_prefix_cache=True)})
    assert outputs[1][0].cached_tokens == 0
    assert bits(outputs)[1] == first


# Endings


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


# Sampling


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


def test_counter_of_ids_is_the_callers(lm: FrozenLM) -> None:
    bench = Bench(lm)
    keys = itertools.islice(itertools.count(1000, 7), 3)
    assert set(bench.run({key: request(5) for key in keys})) == {1000, 1007, 1014}
