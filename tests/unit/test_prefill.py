"""A document's KV, a chunk at a time: compiled or not it is that of a plain forward, and anybody may go on with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM

from foundry.errors import InvalidArgument
from foundry.model import layers
from foundry.model.attention import flex
from foundry.model.attention.flex import BLOCK
from foundry.model.attention.prefill import FlexPrefill, PrefillAttention
from foundry.model.lm import FrozenLM
from tests.tiny import build_tiny_model
from tests.unit.test_flex import by_a_dense_product

CHUNK = 2 * BLOCK
# Below a block, whole ones, a last chunk of one token, and several chunks.
LENGTHS = (1, BLOCK - 1, BLOCK, CHUNK, CHUNK + 1, 3 * CHUNK - BLOCK, 2 * CHUNK + 77)
PLANS = {"masked": PrefillAttention, "flex": FlexPrefill}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(params=PLANS)
def lm(request: pytest.FixtureRequest, directory: Path, monkeypatch: pytest.MonkeyPatch) -> FrozenLM:
    lm = FrozenLM.load(directory)
    monkeypatch.setattr(lm, "prefill_plan", PLANS[request.param])
    monkeypatch.setattr(flex, "flex_attention", by_a_dense_product)
    return lm


def ids_of(num_tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(3, 380, (num_tokens,), generator=generator).tolist()


@torch.no_grad()
def by_transformers(directory: Path, ids: list[int]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    cache = model(torch.tensor([ids]), use_cache=True).past_key_values
    return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_equals_a_plain_forward(directory: Path, lm: FrozenLM, num_tokens: int) -> None:
    ids = ids_of(num_tokens)
    found, expected = lm.prefill(ids, chunk_tokens=CHUNK), by_transformers(directory, ids)
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_who_stops_and_goes_on_gets_the_same_bits(lm: FrozenLM) -> None:
    ids = ids_of(LENGTHS[-1])
    kv_L2GPD = lm.unfilled(len(ids)).fill_(torch.nan)
    begin = next(lm.fill(kv_L2GPD, ids, chunk_tokens=CHUNK))
    assert begin == CHUNK
    assert not kv_L2GPD[:, :, :, :begin].isnan().any()
    assert kv_L2GPD[:, :, :, begin:].isnan().all()
    assert [*lm.fill(kv_L2GPD, ids, begin, chunk_tokens=CHUNK)] == [2 * CHUNK, len(ids)]
    assert kv_L2GPD.equal(lm.prefill(ids, chunk_tokens=CHUNK))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_reads_the_mask_so(directory: Path) -> None:
    lm = FrozenLM.load(directory)
    ids = ids_of(LENGTHS[-1])
    expected = lm.prefill(ids, chunk_tokens=CHUNK)
    lm.prefill_plan = FlexPrefill
    found = lm.prefill(ids, chunk_tokens=CHUNK)
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_a_chunk_within_a_block_is_refused(lm: FrozenLM) -> None:
    if lm.prefill_plan is FlexPrefill:
        with pytest.raises(InvalidArgument, match="begins at token 100"):
            lm.prefill(ids_of(200), chunk_tokens=100)


def test_no_position_lies_behind_the_last_token(lm: FrozenLM) -> None:
    plan = lm.prefill_plan(lm.unfilled(CHUNK + 5), CHUNK, 5)
    assert plan.positions_T[:5].tolist() == list(range(CHUNK, CHUNK + 5))
    assert plan.positions_T.max() == CHUNK + 4


def test_one_code_for_first_chunks_and_one_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would compile, counted with a compiler that changes nothing; a graph break would raise."""
    counter = CompileCounter()
    monkeypatch.setattr(layers, "_on_cuda", lambda layer: True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    lm = FrozenLM.load(build_tiny_model(tmp_path))
    lm.prefill_plan = FlexPrefill
    for num_tokens in LENGTHS:
        lm.prefill(ids_of(num_tokens), chunk_tokens=CHUNK)
    torch.compiler.reset()
    assert counter.frame_count == 2
