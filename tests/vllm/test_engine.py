"""The vLLM engine against plain forwards of the same model; `make test-vllm` has the environment for it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.envs import disable_envs_cache

from foundry.errors import InvalidArgument
from foundry.model.info import ModelInfo
from foundry.model.lm import FrozenLM
from foundry.model.rotation import KeyRotation
from foundry.v1 import rollout_pb2
from services.rollout.engine import FinishReason, SequenceRequest, TokenOutput
from services.rollout.engine.vllm import connector
from services.rollout.engine.vllm.connector import CartridgeConnector
from services.rollout.engine.vllm.engine import VllmEngine
from services.rollout.grammar import Grammars
from tests.tiny import Family, build_tiny_model
from tests.unit.engine.bench import Bench, bits, ids_of, logprobs_of, make_kv, random_ids, request
from tests.unit.engine.test_adjusted import ADJUSTED, defined, model_logits

# vLLM's, in tokens, on CPUs.
BLOCK = 128
SIZES = (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 300)
# Keys and values of two layers, two heads, 32 numbers of 4 bytes.
BLOCK_BYTES = BLOCK * 2 * 2 * 2 * 32 * 4


Start = Callable[..., Bench]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts an engine of a model directory. One at a time: what vLLM sets up for one it takes down for all. All of it
    is in this process, where its parts can be looked at; test_processes.py has it as it is served."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    disable_envs_cache()
    engines = []

    def start(model: Path, **settings: Any) -> Bench:
        values: dict[str, Any] = {
            "model_name": "tiny",
            "device": "cpu",
            "dtype": torch.float32,
            "max_sequences": 8,
            "max_context_tokens": 512,
            "prefill_tokens_per_step": 512,
            "kv_bytes": 64 * BLOCK_BYTES,
            "cuda_graphs": False,
        }
        engines.append(VllmEngine(model, ModelInfo.read(model), **(values | settings)))
        return Bench(FrozenLM.load(model), engine=engines[-1])

    yield start
    for engine in engines:
        engine._llm.engine_core.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"), head_dim=32)


@pytest.fixture
def bench(model: Path, start: Start) -> Bench:
    return start(model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_cartridges_versions_lists_and_none_in_one_batch(family: Family, tmp_path: Path, start: Start) -> None:
    bench = start(build_tiny_model(tmp_path, family, head_dim=32))
    for p in SIZES:
        bench.load(f"{p}@1", make_kv(bench.lm, p))
        bench.load(f"{p}@2", make_kv(bench.lm, p, seed=1))
    uses: list[tuple[str, ...]] = [()]
    uses += [(f"{p}@{version}",) for p in SIZES for version in (1, 2)]
    uses += [("1@1", "129@2"), ("129@2", "1@1"), ("127@1", "128@2", "1@2"), ("300@1", "1@1")]
    requests = {index: request(12 + 3 * index, *use, seed=index) for index, use in enumerate(uses)}
    # The second time out of vLLM's prefix cache.
    for _ in range(2):
        outputs = bench.run(requests)
        for index, use in enumerate(uses):
            assert len(outputs[index]) == 8
            bench.check(requests[index], outputs[index])
            assert {output.digests for output in outputs[index]} == {use}
            assert {output.cartridge_tokens for output in outputs[index]} == {sum(bench.kv[n].shape[3] for n in use)}
    # The check can fail: the other version gives other numbers.
    other = bench.expected_logprobs(replace(requests[1], digests=("1@2",)), ids_of(outputs[1]))
    chosen = other.gather(1, torch.tensor(ids_of(outputs[1]))[:, None])[:, 0]
    assert (chosen - torch.tensor(logprobs_of(outputs[1]))).abs().max() > 0.1


def test_cartridges_stand_behind_each_other(bench: Bench) -> None:
    rotation = bench.engine.rotation
    assert isinstance(rotation, KeyRotation)
    kept = make_kv(bench.lm, 100)
    bench.load("first", make_kv(bench.lm, 37))
    bench.load("second", kept)
    bench.load("second+37", rotation.move(kept, 37))
    requests = {index: request(12, "first", name, seed=1) for index, name in enumerate(("second", "second+37"))}
    outputs = bench.run(requests)
    for index, each in requests.items():
        bench.check(each, outputs[index])
    assert logprobs_of(outputs[0]) != logprobs_of(outputs[1])


def test_what_is_staged_in_pieces_is_written_whole(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    # Keys and values of two layers, two heads, 32 numbers of 4 bytes: 70 tokens at a time, and a little.
    monkeypatch.setattr(connector, "_STAGING_BYTES", 70 * 2 * 2 * 2 * 32 * 4 + 5)
    for p in SIZES:
        bench.load(str(p), make_kv(bench.lm, p))
    uses = [("300",), ("1", "127"), ("129", "1"), (), ("128",), ("127", "129", "1")]
    requests = {index: request(20, *use, seed=index) for index, use in enumerate(uses)}
    for index, outputs in bench.run(requests).items():
        bench.check(requests[index], outputs)


def test_a_narrower_cartridge_is_widened_exactly(bench: Bench) -> None:
    narrow = make_kv(bench.lm, 17).to(torch.bfloat16)
    bench.load("narrow", narrow)
    bench.kv["narrow"] = narrow.float()
    asked = request(20, "narrow")
    bench.check(asked, bench.run({0: asked})[0])


def test_logprobs_are_raw_and_in_order(bench: Bench) -> None:
    bench.load("raw", make_kv(bench.lm, 16))
    asked = request(20, "raw", temperature=0.3, top_k=3, num_logprobs=20)
    outputs = bench.run({0: asked})[0]
    expected = torch.topk(bench.expected_logprobs(asked, ids_of(outputs)), 20)
    found = torch.tensor([[logprob for _, logprob in output.top_logprobs] for output in outputs])
    torch.testing.assert_close(found, expected.values, atol=1e-4, rtol=0)
    assert [[token_id for token_id, _ in output.top_logprobs] for output in outputs] == expected.indices.tolist()


def test_a_seed_decides_the_answer(bench: Bench) -> None:
    prompt = random_ids(10)
    asked = {seed: request(prompt, seed=seed) for seed in (0, 1, 2, 2**64 - 1)}
    answers = {seed: ids_of(bench.run({seed: each})[seed]) for seed, each in asked.items()}
    assert len({tuple(ids) for ids in answers.values()}) == 4
    assert {seed: ids_of(outputs) for seed, outputs in bench.run(asked).items()} == answers
    greedy = request(prompt, temperature=0)
    ids = ids_of(bench.run({0: greedy})[0])
    assert ids == bench.expected_logprobs(greedy, ids).argmax(dim=-1).tolist()


def test_lengths_texts_and_stop_strings(bench: Bench) -> None:
    asked = request(5, max_new_tokens=60, seed=3)
    everything = bench.run({0: asked})[0]
    assert [output.finish_reason for output in everything] == [None] * 59 + [FinishReason.LENGTH]
    text = "".join(output.text for output in everything)
    assert text == bench.lm.tokenizer.decode(ids_of(everything), skip_special_tokens=True)
    stop = text[20:26]
    stopping = replace(asked, sampling=replace(asked.sampling, stop=("never", stop)))
    outputs = bench.run({0: stopping, 1: request(5)})
    assert "".join(output.text for output in outputs[0]) == text[: text.index(stop)]
    assert outputs[0][-1].finish_reason is FinishReason.STOP
    assert ids_of(outputs[0]) == ids_of(everything)[: len(outputs[0])]
    assert len(outputs[1]) == 8


def test_an_end_token_ends_a_sequence_and_is_among_its_ids(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(5, max_new_tokens=20)
    everything = bench.run({0: asked})[0]
    # A random model hardly ever ends by itself: let it end with what it says.
    eos = everything[7].token_id
    end = ids_of(everything).index(eos)
    engine: Any = bench.engine
    monkeypatch.setattr(engine, "_info", replace(engine._info, eos_ids=frozenset({eos})))
    outputs = bench.run({0: replace(asked, sampling=replace(asked.sampling, ignore_eos=False))})[0]
    assert ids_of(outputs) == ids_of(everything)[: end + 1]
    assert [output.finish_reason for output in outputs] == [None] * end + [FinishReason.STOP]


def test_a_beginning_is_reused_and_only_behind_the_same_digests(bench: Bench) -> None:
    bench.load("report@1", make_kv(bench.lm, 16, seed=5))
    bench.load("report@2", make_kv(bench.lm, 16, seed=6))
    uses: list[tuple[str, ...]] = [("report@1",), ("report@2",), (), ("report@1", "report@2"), ("report@2", "report@1")]
    for key, use in enumerate(uses):
        asked = request(3 * BLOCK // 2, *use, seed=77)
        outputs = bench.run({key: asked})[key]
        assert outputs[0].cached_tokens == 0
        bench.check(asked, outputs)
    asked = request(3 * BLOCK // 2, "report@1", seed=77)
    first = bench.run({9: asked})
    # The cartridge's own tokens are no reuse of the prompt's.
    assert first[9][0].cached_tokens == BLOCK - 16


def test_a_beginning_is_reused_only_within_a_tenant(bench: Bench) -> None:
    bench.load("a", make_kv(bench.lm, 16))
    asked = request(3 * BLOCK // 2, "a")
    bench.run({0: asked})
    tenants = ["acme", "acme", ""]
    cached = [
        bench.run({key: replace(asked, tenant=tenant)})[key][0].cached_tokens > 0
        for key, tenant in enumerate(tenants, start=1)
    ]
    assert cached == [False, True, True]


@pytest.mark.parametrize("p", [0, 1, 3, 4, 16, BLOCK, 2 * BLOCK, 300])
def test_a_prompt_is_computed_anew_and_its_cartridge_stays_shared(
    bench: Bench, p: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[int] = []
    place = CartridgeConnector.update_state_after_alloc

    def noting(self: CartridgeConnector, request: Any, blocks: Any, num_external_tokens: int) -> None:
        loads.append(num_external_tokens)
        place(self, request, blocks, num_external_tokens)

    monkeypatch.setattr(CartridgeConnector, "update_state_after_alloc", noting)
    if p:
        bench.load("a", make_kv(bench.lm, p))
    # A whole block of its own, so that there is something to reuse.
    asked = request(BLOCK + 10, *(["a"] if p else []), skip_prefix_cache=True, temperature=0)
    found = bench.run(dict.fromkeys((5, 6, 7), asked))
    for outputs in found.values():
        assert outputs[0].cached_tokens == 0
        bench.check(asked, outputs)
    assert loads == [p] + 2 * [p - max(0, p - 4) // BLOCK * BLOCK]


def test_equal_digests_after_unloading_are_equal_bytes(bench: Bench) -> None:
    bench.load("again", make_kv(bench.lm, 130))
    asked = request(20, "again", temperature=0, skip_prefix_cache=True)
    first = bits(bench.run({0: asked}))
    bench.engine.unload("again")
    bench.load("again", make_kv(bench.lm, 130))
    assert bits(bench.run({0: asked})) == first


def test_churn(bench: Bench) -> None:
    """Arrivals and cancellations at random, at every stage of a sequence; each number stays right."""
    generator = random.Random(0)
    for p in SIZES:
        bench.load(str(p), make_kv(bench.lm, p))
    requests: dict[int, SequenceRequest] = {}
    outputs: dict[int, list[TokenOutput]] = {}
    cancelled = set()
    for key in range(100, 160):
        prompt = random_ids(140, seed=generator.randrange(3))[: generator.randrange(1, 140)]
        use = [str(p) for p in generator.sample(SIZES[:4], k=generator.randrange(3))]
        requests[key] = request(prompt, *use, seed=key, max_new_tokens=generator.randrange(1, 12))
        bench.engine.admit({key: requests[key]})
        outputs[key] = []
        if generator.random() < 0.3:
            cancelled.add(victim := generator.randrange(100, key + 1))
            bench.engine.cancel(victim)
        for output in bench.engine.step():
            outputs[output.sequence_id].append(output)
    for key, rest in bench.finish(requests).items():
        outputs[key] += rest
    for key in requests:
        if outputs[key]:
            bench.check(requests[key], outputs[key])
        if key not in cancelled:
            assert len(outputs[key]) == requests[key].sampling.max_new_tokens
    assert len(cancelled) > 10
    assert any(outputs[key][0].cached_tokens for key in requests if outputs[key])
    stats = bench.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_used_bytes) == (0, 0, 0)


def test_preempted_and_evicted_sequences_get_their_cartridges_back(
    model: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[str] = []
    place = CartridgeConnector.update_state_after_alloc

    def noting(self: CartridgeConnector, request: Any, blocks: Any, num_external_tokens: int) -> None:
        placed.append(request.request_id)
        place(self, request, blocks, num_external_tokens)

    monkeypatch.setattr(CartridgeConnector, "update_state_after_alloc", noting)
    # Two sequences fit when they begin; before they end each needs more than half.
    bench = start(model, kv_bytes=7 * BLOCK_BYTES)
    for version in range(4):
        bench.load(str(version), make_kv(bench.lm, 150, seed=version))
    requests = {
        version: request(60, str(version), seed=version, max_new_tokens=200, temperature=0) for version in range(4)
    }
    for _ in range(2):
        for key, outputs in bench.run(requests).items():
            assert len(outputs) == 200
            bench.check(requests[key], outputs)
    assert len(placed) > len(set(placed)), "nothing was preempted"


def test_a_placeholder_is_never_computed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.load("a", make_kv(bench.lm, 20))
    monkeypatch.setattr(CartridgeConnector, "get_num_new_matched_tokens", lambda *_: (0, False))
    with pytest.raises(RuntimeError, match="placeholders"):
        bench.run({0: request(5, "a")})


def test_an_answer_without_its_cartridge_is_never_given(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.load("a", make_kv(bench.lm, 20))
    monkeypatch.setattr(CartridgeConnector, "start_load_kv", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match="without the cartridges"):
        bench.run({0: request(5, "a")})


def test_sequences_wait_and_run(bench: Bench) -> None:
    bench.engine.admit({key: request(5, seed=key, max_new_tokens=3) for key in range(10)})
    assert bench.engine.stats().num_waiting == 10
    bench.engine.step()
    stats = bench.engine.stats()
    assert (stats.num_running, stats.num_waiting) == (8, 2)
    assert stats.kv_used_bytes == pytest.approx(8 * BLOCK_BYTES, rel=0.02)
    assert stats.kv_bytes == 64 * BLOCK_BYTES
    bench.finish(range(10))


@pytest.mark.parametrize(
    ("engine_args", "fault"),
    [
        ({"max_model_len": 64}, "the foundry sets vLLM's max_model_len itself"),
        ({"max_model_length": 64}, "no engine argument max_model_length"),
        ({"tensor_parallel_size": 2}, "cartridges reach one worker"),
    ],
)
def test_engine_arguments_that_cannot_be_set_are_refused(
    model: Path, start: Start, engine_args: dict[str, Any], fault: str
) -> None:
    with pytest.raises(InvalidArgument, match=fault) as refused:
        start(model, engine_args=engine_args)
    assert refused.value.field == "vllm.engine_args"


def test_further_engine_arguments_reach_vllm(model: Path, start: Start) -> None:
    bench = start(model, engine_args={"block_size": 32})
    engine: Any = bench.engine
    assert engine._llm.vllm_config.cache_config.block_size == 32
    bench.load("a", make_kv(bench.lm, 33))
    asked = request(20, "a")
    bench.check(asked, bench.run({0: asked})[0])


@pytest.mark.parametrize("device", ["cuda", "cpu:0"])
def test_another_device_is_refused(model: Path, start: Start, device: str) -> None:
    with pytest.raises(InvalidArgument, match=f"runs on cpu, not on {device}"):
        start(model, device=device)


@pytest.mark.parametrize("sampling", ADJUSTED, ids=lambda sampling: "+".join(sampling))
def test_logits_are_adjusted_as_the_built_in_engine_does(bench: Bench, sampling: dict[str, Any]) -> None:
    """Behind a cartridge, whose placeholders are no tokens of the prompt."""
    bench.load("c", make_kv(bench.lm, 5))
    asked = request(6, "c", temperature=0.0, max_new_tokens=12, **sampling)
    for _ in range(2):
        ids = ids_of(outputs := bench.run({0: asked})[0])
        logits = model_logits(bench, asked, ids)
        for place, token in enumerate(ids):
            expected = defined(logits[place], asked.sampling, asked.prompt_ids, ids[:place])
            assert expected[token] >= expected.max() - 1e-3
        bench.check(asked, outputs)


def test_placeholders_are_not_penalised(bench: Bench) -> None:
    """Token 0 stands before the prompt for every token of the cartridge."""
    bench.load("c", make_kv(bench.lm, 200))
    sampling: dict[str, Any] = {"repetition_penalty": 0.01, "logit_bias": ((0, 8.0),)}
    asked = request(6, "c", temperature=0.0, max_new_tokens=4, **sampling)
    ids = ids_of(bench.run({0: asked})[0])
    logits = model_logits(bench, asked, ids)
    assert defined(logits[0], asked.sampling, (*asked.prompt_ids, 0), [])[0] > 10 * logits.max()
    for place, token in enumerate(ids):
        expected = defined(logits[place], asked.sampling, asked.prompt_ids, ids[:place])
        assert expected[token] >= expected.max() - 1e-3


@pytest.mark.parametrize("digests", [(), ("c",), ("long", "c")])
def test_prompts_are_scored(bench: Bench, digests: tuple[str, ...]) -> None:
    bench.load("c", make_kv(bench.lm, 5))
    bench.load("long", make_kv(bench.lm, 200))
    asked = request(140, *digests, num_prompt_logprobs=3, max_new_tokens=2)
    expected = torch.log_softmax(model_logits(bench, asked, [], every=True), dim=-1)[:-1]
    chosen = expected.gather(1, torch.tensor(asked.prompt_ids[1:])[:, None])
    # The second time its KV is there.
    for sequence_id in range(2):
        first, second = bench.run({sequence_id: asked})[sequence_id]
        assert first.prompt_logprobs is not None
        assert second.prompt_logprobs is None
        torch.testing.assert_close(first.prompt_logprobs.logprobs_n, chosen[:, 0], atol=1e-4, rtol=0)
        assert first.prompt_logprobs.ranks_n.tolist() == ((expected > chosen).sum(dim=-1) + 1).tolist()
        assert first.prompt_logprobs.top_ids_nK.tolist() == expected.topk(3).indices.tolist()


def test_answers_are_held_to_a_grammar_and_end_with_it(bench: Bench) -> None:
    bench.load("c", make_kv(bench.lm, 5))
    properties = {"a": {"enum": [1, "ü"]}}
    schema = {"type": "object", "properties": properties, "required": ["a"], "additionalProperties": False}
    grammars = Grammars(bench.lm.info)
    for asked in (rollout_pb2.Grammar(json_schema=json.dumps(schema)), rollout_pb2.Grammar(regex="(ab){3}")):
        compiled = grammars.compile(asked)
        requests = {
            seed: request(6, *digests, seed=seed, max_new_tokens=300, ignore_eos=False, grammar=compiled)
            for seed, digests in enumerate([(), ("c",)])
        }
        for outputs in bench.run(requests).values():
            assert outputs[-1].finish_reason is FinishReason.STOP
            text = "".join(output.text for output in outputs)
            assert text == "ababab" or json.loads(text)["a"] in (1, "ü")
