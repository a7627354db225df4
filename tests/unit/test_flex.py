"""The plan for CUDA, whose parts are compared on a CPU: its blocks, what it computes, and where its gradient goes.

FlexAttention itself has no backward on a CPU. For gradients a product over all keys stands in for it, that reads the
same block mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from foundry.errors import InvalidArgument
from foundry.model import layers
from foundry.model.attention import flex
from foundry.model.attention.flex import BLOCK, FlexAttention, Spans, block_mask
from foundry.model.attention.packed import PackedAttention
from foundry.model.attention.whole import attend_whole
from foundry.model.lm import FrozenLM
from tests.tiny import build_tiny_model

# Lengths of sequences, and for each the length of its prefix: equal ones are one and the same prefix.
CASES = {
    "one shared": ([70, 3, 150, 90], [130, 130, 130, 130]),
    "several": ([60, 128, 5, 200], [12, 128, 12, 300]),
    "none": ([1, 127, 129], [0, 0, 0]),
    "with and without": ([40, 40, 40], [0, 20, 0]),
    "whole blocks": ([128, 256], [256, 256]),
    "below a block": ([7], [9]),
}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FrozenLM:
    return FrozenLM.load(build_tiny_model(tmp_path_factory.mktemp(request.param), request.param))


def sequences_of(lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 380, (length,), generator=generator).tolist() for length in lengths]


def prefixes_of(lm: FrozenLM, lengths: Sequence[int]) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        length: torch.randn(lm.spec.kv_shape(length), generator=generator).requires_grad_()
        for length in sorted(set(lengths) - {0})
    }


def dense(mask: BlockMask) -> Tensor:
    """Bool [T, K]: every key of a full block, and of one seen in part what the function says."""
    num_queries, num_keys = mask.seq_lengths
    said_TK = mask.mask_mod(
        torch.tensor(0), torch.tensor(0), torch.arange(num_queries)[:, None], torch.arange(num_keys)[None]
    )

    def marked(num_11Q: Tensor | None, indices_11QC: Tensor | None) -> Tensor:
        assert num_11Q is not None
        assert indices_11QC is not None
        blocks_QC = torch.zeros(indices_11QC.shape[2:], dtype=torch.bool)
        for row, (number, indices) in enumerate(zip(num_11Q[0, 0], indices_11QC[0, 0], strict=True)):
            blocks_QC[row, indices[:number].long()] = True
        return blocks_QC.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)

    partial_TK = marked(mask.kv_num_blocks, mask.kv_indices)
    return marked(mask.full_kv_num_blocks, mask.full_kv_indices) | (partial_TK & said_TK)


def by_a_dense_product(
    query: Tensor, key: Tensor, value: Tensor, *, block_mask: BlockMask, scale: float, enable_gqa: bool
) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=dense(block_mask), scale=scale, enable_gqa=enable_gqa
    )


def hidden_by(
    lm: FrozenLM, plan: Any, case: str, prefixes: dict[int, Tensor], monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    lengths, behind = CASES[case]
    monkeypatch.setattr(lm, "packed_plan", plan)
    return lm.packed_hidden(sequences_of(lengths), [prefixes.get(length) for length in behind])


@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_plan(lm: FrozenLM, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients of the prefixes, within 1e-5 of the largest."""
    prefixes = prefixes_of(lm, CASES[case][1])
    monkeypatch.setattr(flex, "flex_attention", by_a_dense_product)
    found = hidden_by(lm, FlexAttention, case, prefixes, monkeypatch)
    expected = hidden_by(lm, PackedAttention, case, prefixes, monkeypatch)
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    if not prefixes:
        assert not found.requires_grad
        return
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    gradients = [torch.autograd.grad((hidden * weights).sum(), list(prefixes.values())) for hidden in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * other.abs().max().item(), rtol=0)
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_layers_computed_anew_give_the_same_gradient(lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, behind = CASES["one shared"]
    prefixes = prefixes_of(lm, behind)
    num_calls = 0

    def counted(*tensors: Tensor, **options: Any) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return by_a_dense_product(*tensors, **options)

    monkeypatch.setattr(flex, "flex_attention", counted)
    monkeypatch.setattr(lm, "packed_plan", FlexAttention)
    gradients = []
    for recompute in (False, True):
        hidden_TE = lm.packed_hidden(
            sequences_of(lengths), [prefixes[length] for length in behind], recompute=recompute
        )
        gradients.append(torch.autograd.grad(hidden_TE.square().sum(), list(prefixes.values())))
    # Each layer once, and then twice.
    assert num_calls == 3 * lm.spec.num_layers
    for kept, anew in zip(*gradients, strict=True):
        assert torch.equal(kept, anew)


@pytest.mark.parametrize("case", ["one shared", "several", "none"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@torch.no_grad()
def test_flex_attention_reads_the_mask_so(lm: FrozenLM, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes = prefixes_of(lm, CASES[case][1])
    found = hidden_by(lm, FlexAttention, case, prefixes, monkeypatch)
    expected = hidden_by(lm, PackedAttention, case, prefixes, monkeypatch)
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("case", ["one shared", "whole blocks", "below a block"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@torch.no_grad()
def test_one_prefix_is_read_apart(lm: FrozenLM, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes = {length: prefix.detach() for length, prefix in prefixes_of(lm, CASES[case][1]).items()}
    monkeypatch.setattr(flex, "reads_whole", lambda kv: kv is not None)
    read: list[int] = []

    def noted(q_HTD: Tensor, k_GPD: Tensor, v_GPD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        read.append(k_GPD.shape[1])
        return attend_whole(q_HTD, k_GPD, v_GPD, scale)

    monkeypatch.setattr(flex, "attend_whole", noted)
    found = hidden_by(lm, FlexAttention, case, prefixes, monkeypatch)
    expected = hidden_by(lm, PackedAttention, case, prefixes, monkeypatch)
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    assert read == [CASES[case][1][0]] * lm.spec.num_layers


@pytest.mark.parametrize("seed", range(8))
def test_blocks_are_those_that_torch_finds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    lengths = [draw(300) for _ in range(draw(5))]
    lengths.append(-sum(lengths) % BLOCK or BLOCK)
    num_prefix_keys = BLOCK * draw(4)
    prefixes = [(begin := draw(num_prefix_keys) - 1, begin + draw(num_prefix_keys - begin)) for _ in lengths]
    prefixes[0] = (0, 0)
    spans = Spans.of(lengths, prefixes, num_prefix_keys)
    num_keys = num_prefix_keys + sum(lengths)
    found = block_mask(spans, num_keys)
    expected = create_block_mask(found.mask_mod, None, None, sum(lengths), num_keys, device="cpu", BLOCK_SIZE=BLOCK)
    assert found.seq_lengths == expected.seq_lengths
    for side in ("kv", "q", "full_kv", "full_q"):
        num, indices = getattr(found, f"{side}_num_blocks"), getattr(found, f"{side}_indices")
        assert torch.equal(num, getattr(expected, f"{side}_num_blocks")), side
        assert torch.equal(indices, getattr(expected, f"{side}_indices")), side
    seen_TK = dense(found)
    segments_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    assert torch.equal(seen_TK[:, num_prefix_keys:], (segments_T[:, None] == segments_T[None]).tril())
    widths = torch.tensor([end - begin for begin, end in prefixes])
    assert torch.equal(seen_TK[:, :num_prefix_keys].sum(1), widths[segments_T])


@pytest.mark.parametrize("apart", [False, True])
def test_one_code_for_all_layers_lengths_and_prefixes(
    apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU would compile, counted with a compiler that changes nothing; a graph break would raise."""
    counter = CompileCounter()
    monkeypatch.setattr(flex, "reads_whole", lambda kv: apart)
    monkeypatch.setattr(layers, "_on_cuda", lambda layer: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    lm = FrozenLM.load(build_tiny_model(tmp_path))
    lm.packed_plan = FlexAttention
    with torch.no_grad():
        for lengths, behind in [([300], 200), ([200, 100], 130), ([30] * 10, 64), ([210], 300)]:
            prefix = torch.zeros(lm.spec.kv_shape(behind))
            lm.packed_hidden(sequences_of(lengths), [prefix] * len(lengths))
    torch.compiler.reset()
    assert counter.frame_count == 1


def test_lengths_are_checked() -> None:
    for sequences, message in (([[1], []], "sequence 1 is empty"), ([[1] * 9], "the model's context is 8")):
        with pytest.raises(InvalidArgument, match=message):
            FlexAttention(sequences, [None] * len(sequences), 8, torch.device("cpu"))
