"""Parity with transformers: a cartridge that is the first p tokens of a context changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foundry.errors import InvalidArgument, ModelUnsupported
from foundry.model.attention import ATTENTION
from foundry.model.attention.packed import PackedAttention
from foundry.model.attention.shared import SharedPrefixAttention
from foundry.model.lm import FrozenLM
from tests.tiny import build_tiny_model

NUM_TOKENS = 90


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def lm(directory: Path) -> FrozenLM:
    return FrozenLM.load(directory)


def random_ids(num_tokens: int, lm: FrozenLM, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, lm.spec.vocab_size, (num_tokens,), generator=generator).tolist()


@torch.no_grad()
def reference_logits(directory: Path, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("p", [1, 15, 16, 17, 64])
def test_prefix_is_the_context(directory: Path, lm: FrozenLM, p: int) -> None:
    ids = random_ids(NUM_TOKENS, lm)
    expected = reference_logits(directory, ids)[p:]
    with torch.no_grad():
        logits = lm.logits(lm.packed_hidden([ids[p:]], [lm.prefill(ids[:p], chunk_tokens=16)]))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    # The prefix does something: without it the same tokens give other logits.
    with torch.no_grad():
        bare = lm.logits(lm.packed_hidden([ids[p:]], [None]))
    assert (bare - expected).abs().max() > 0.1


def test_packed_sequences_see_their_own_prefix_only(directory: Path, lm: FrozenLM) -> None:
    contexts = [random_ids(length, lm, seed=length) for length in (33, 7, 33)]
    tails = [random_ids(length, lm, seed=100 + length) for length in (12, 1, 30)]
    with torch.no_grad():
        hidden = lm.packed_hidden(tails, [lm.prefill(context) for context in contexts])
    logits = lm.logits(hidden).split([len(tail) for tail in tails])
    for context, tail, found in zip(contexts, tails, logits, strict=True):
        expected = reference_logits(directory, [*context, *tail])[len(context) :]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_prefixes_read_once_are_as_if_read_by_each(lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several behind one prefix, between others behind another, an empty one or none; one prefix in two places."""
    first, second = (lm.prefill(random_ids(length, lm, seed=length)) for length in (33, 7))
    empty = first[:, :, :, :0]
    tails = [random_ids(length, lm, seed=length) for length in (12, 1, 30, 5, 40, 3, 8, 9)]
    places = [0, 0, 0, 1, 1, None, 2, 0]

    def run(plan: type[PackedAttention | SharedPrefixAttention]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        monkeypatch.setattr(lm, "packed_plan", plan)
        leaves = [prefix.clone().requires_grad_() for prefix in (first, second)]
        behind = [None if place is None else (*leaves, empty)[place] for place in places]
        hidden = lm.packed_hidden(tails, behind)
        weight = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
        return hidden.detach(), list(torch.autograd.grad((hidden * weight).sum(), leaves))

    assert lm.packed_plan is SharedPrefixAttention
    hidden, grads = run(SharedPrefixAttention)
    expected, expected_grads = run(PackedAttention)
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-4, rtol=1e-4)


def test_prefill_does_not_depend_on_its_chunks(lm: FrozenLM) -> None:
    ids = random_ids(50, lm)
    torch.testing.assert_close(lm.prefill(ids, chunk_tokens=7), lm.prefill(ids), atol=1e-5, rtol=0)


def test_sequences_that_cannot_be_packed_are_refused(lm: FrozenLM) -> None:
    with pytest.raises(InvalidArgument, match="sequence 1 is empty"):
        lm.packed_hidden([[5], []], [None, None])
    prefix = lm.prefill(random_ids(500, lm))
    with pytest.raises(InvalidArgument, match=r"13 tokens behind a prefix of 500.* 512"):
        lm.packed_hidden([random_ids(13, lm)], [prefix])


@pytest.mark.parametrize("extra", ["sliding_window", "softcap", "s_aux"])
def test_attention_that_a_plan_would_leave_out_is_refused(lm: FrozenLM, extra: str) -> None:
    attention = ALL_ATTENTION_FUNCTIONS[ATTENTION]
    base: Any = lm.model.base_model
    layer = base.layers[0].self_attn
    tensor = torch.zeros(1, 4, 3, 16)
    with pytest.raises(ModelUnsupported, match=extra):
        attention(layer, tensor, tensor, tensor, None, scaling=1.0, plan=None, **{extra: 1.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 64, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, "sliding"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'"),
    ],
)
def test_models_that_would_be_computed_wrongly_are_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    directory = build_tiny_model(tmp_path / "model", "qwen2")
    model = AutoModelForCausalLM.from_pretrained(directory)
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(ModelUnsupported, match=message):
        FrozenLM(model, None, "blake3:0")  # type: ignore[arg-type]
