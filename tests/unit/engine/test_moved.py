"""Cartridges whose keys stand behind those of the ones before them, against forwards that put them there."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foundry.model.attention import attend_masked, causal_mask
from foundry.model.cartridge import Cartridge
from foundry.model.lm import FrozenLM
from foundry.model.rotation import KeyRotation
from services.rollout.copies import key_of, moved, read_key
from services.rollout.engine import SequenceRequest
from tests.tiny import Family, build_model, build_tokenizer
from tests.unit.engine.bench import Bench, bits, make_kv, random_ids, request

THETA = {"rope_theta": 10_000.0}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    # Multiplies keys by more than one, which must happen once.
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
}
LENGTHS = (16, 23, 9)
NAMES = tuple(f"c{index}" for index in range(len(LENGTHS)))
OFFSETS = tuple(accumulate(LENGTHS[:-1], initial=0))


def load(family: Family, rope: str) -> FrozenLM:
    model = build_model(family)
    model.config.rope_parameters = ROPES[rope] | THETA
    scaled = type(model)(model.config)
    scaled.load_state_dict(model.state_dict())
    scaled.generation_config = model.generation_config
    return FrozenLM(scaled, build_tokenizer(), "blake3:" + "0" * 64)


class _Recording:
    """One sequence that attends to itself; its KV stays."""

    def __init__(self, num_tokens: int) -> None:
        self._mask_SK = causal_mask(num_tokens, 0, torch.device("cpu"))
        self.kv: list[Tensor] = []

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        self.kv.append(torch.stack([k_GTD, v_GTD]))
        return attend_masked(q_HTD, k_GTD, v_GTD, self._mask_SK, scale).transpose(0, 1)


@torch.no_grad()
def kv_at(lm: FrozenLM, ids: tuple[int, ...], begin: int) -> Tensor:
    """KV [L, 2, G, P, D] of tokens that see each other alone, at positions from `begin` on: by the model itself."""
    plan = _Recording(len(ids))
    lm.hidden(torch.tensor(ids), torch.arange(begin, begin + len(ids)), plan)
    return torch.stack(plan.kv)


def behind_each_other(bench: Bench) -> tuple[str, ...]:
    """Loads the cartridges as a server does, and puts into the bench what the model itself has there; their keys."""
    lm, rotation = bench.lm, bench.engine.rotation
    assert isinstance(rotation, KeyRotation)
    keys = tuple(map(key_of, NAMES, OFFSETS))
    for index, (key, offset, length) in enumerate(zip(keys, OFFSETS, LENGTHS, strict=True)):
        ids = random_ids(length, seed=50 + index)
        trained = Cartridge(lm.spec.header(length, 1, torch.float32), kv_at(lm, ids, 0))
        before = trained.kv_L2GPD.clone()
        bench.engine.load(key, moved(trained, rotation, offset) if offset else trained)
        # The verified bytes may be in use by others.
        assert trained.kv_L2GPD.equal(before)
        bench.kv[key] = kv_at(lm, ids, offset)
    return keys


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_answers_are_those_behind_keys_computed_there(family: Family, rope: str) -> None:
    bench = Bench(load(family, rope))
    keys = behind_each_other(bench)
    asked = {0: request(20, *keys), 1: request(7, *keys[:2], seed=1), 2: request(5, keys[0], seed=2)}
    outputs = bench.run(asked)
    for index, each in asked.items():
        bench.check(each, outputs[index])
        assert {output.digests for output in outputs[index]} == {each.digests}
        assert {output.cartridge_tokens for output in outputs[index]} == {sum(LENGTHS[: len(each.digests)])}
    # Where they were trained they would be told apart: the check can fail.
    for key, name in zip(keys, NAMES, strict=True):
        bench.kv[key] = kv_at(bench.lm, random_ids(len_of(bench, key), seed=50 + NAMES.index(name)), 0)
    with pytest.raises(AssertionError):
        bench.check(asked[0], outputs[0])


def len_of(bench: Bench, key: str) -> int:
    return bench.kv[key].shape[3]


def test_nothing_is_reused_between_a_cartridge_and_its_copies(lm: FrozenLM) -> None:
    bench = Bench(lm)
    rotation = bench.engine.rotation
    assert isinstance(rotation, KeyRotation)
    kept = Cartridge(lm.spec.header(16, 1, torch.float32), make_kv(lm, 16))
    keys = [key_of("b", shift) for shift in (0, 16, 17)]
    bench.load("a", make_kv(lm, 16, seed=1))
    bench.load("c", make_kv(lm, 17, seed=2))
    for key, shift in zip(keys, (0, 16, 17), strict=True):
        bench.engine.load(key, moved(kept, rotation, shift) if shift else kept)
    answers = []
    for index, digests in enumerate([("a", keys[0]), ("a", keys[1]), ("c", keys[0]), ("c", keys[2])]):
        asked = SequenceRequest(random_ids(20), digests, request(20).sampling)
        first, again = bench.run({index: asked})[index], bench.run({index: asked})[index]
        assert (first[0].cached_tokens, again[0].cached_tokens) == (0, 19)
        answers.append(tuple(output.logprob for output in first))
    assert len(set(answers)) == len(answers)


def test_beside_each_other_in_one_step_each_has_its_own(lm: FrozenLM) -> None:
    """A step reads a cartridge once for all behind it: a copy elsewhere is another."""
    bench = Bench(lm)
    rotation = bench.engine.rotation
    assert isinstance(rotation, KeyRotation)
    bench.load("a", make_kv(lm, 16, seed=1))
    bench.load("b", make_kv(lm, 9))
    copy = moved(Cartridge(lm.spec.header(9, 1, torch.float32), bench.kv["b"]), rotation, 16)
    bench.engine.load(key_of("b", 16), copy)
    bench.kv[key_of("b", 16)] = copy.kv_L2GPD
    asked = {index: request(12, "a", key, seed=index) for index, key in enumerate(("b", "b+16", "b", "b+16"))}
    outputs = bench.run(asked)
    for index, each in asked.items():
        bench.check(each, outputs[index])


def test_a_single_one_is_the_same_to_the_bit(lm: FrozenLM) -> None:
    assert key_of("a", 0) == "a"
    first, second = Bench(lm), Bench(lm)
    for bench in (first, second):
        bench.load(key_of("a", 0), make_kv(lm, 16))
    asked = {0: request(20, "a")}
    assert bits(first.run(asked)) == bits(second.run(asked))


def test_keys_are_read_as_they_were_made() -> None:
    digest = "blake3:" + "0a" * 32
    assert [read_key(key_of(digest, shift)) for shift in (0, 1, 2**31)] == [(digest, 0), (digest, 1), (digest, 2**31)]


def test_a_model_whose_keys_do_not_turn_is_served_and_says_so(lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm.model.base_model, "rotary_emb", None)
    assert "rotary_emb" in str(KeyRotation.known(lm))


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_model_of_another_process_turns_keys_as_it_would_here(family: Family, rope: str, tmp_path: Path) -> None:
    lm = load(family, rope)
    lm.model.config.save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    found, expected = KeyRotation.of_directory(tmp_path, lm.info), KeyRotation.of(lm)
    assert isinstance(found, KeyRotation)
    assert found.layers == expected.layers
    assert torch.equal(found.inv_freq, expected.inv_freq)
    assert torch.equal(torch.random.get_rng_state(), before)
