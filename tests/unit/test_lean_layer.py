"""Lean layers give the numbers of the layers that they stand for, forward and backward, and take no others' place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from foundry.model.attention import ATTENTION
from foundry.model.attention.packed import PackedAttention
from foundry.model.lean_layer import lean_forward
from foundry.model.projections import join_projections
from tests.tiny import build_model


def mistral(sliding_window: int | None = None) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=sliding_window))


MODELS = {
    "llama": build_model,
    "qwen2": lambda: build_model("qwen2"),
    "qwen3": lambda: build_model("qwen3"),
    "mistral": mistral,
}


def frozen(model: Any) -> Any:
    model.set_attn_implementation(ATTENTION)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        # Weights of norms that are all 1 would hide one that is not applied.
        if "norm" in name:
            parameter.data.copy_(1 + torch.rand(parameter.shape, generator=generator))
    return model.train(False).requires_grad_(False)


@pytest.mark.parametrize("family", MODELS)
def test_numbers_and_gradients_are_those_of_the_layer(family: str) -> None:
    model = frozen(MODELS[family]())
    layer = model.model.layers[1]
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 20, 64, generator=generator).requires_grad_()
    plan = PackedAttention([[0] * 12, [0] * 8], [None, None], 100, torch.device("cpu"))
    positions = model.model.rotary_emb(hidden, position_ids=plan.positions_T.unsqueeze(0))
    of_outputs = torch.randn(hidden.shape, generator=generator)
    expected = layer(hidden, position_embeddings=positions, attention_mask=None, plan=plan)
    (expected_gradient,) = torch.autograd.grad(expected, hidden, of_outputs)
    join_projections(model)
    lean = lean_forward(layer)
    assert lean is not None
    found = lean(hidden, position_embeddings=positions, attention_mask=None, plan=plan)
    (gradient,) = torch.autograd.grad(found, hidden, of_outputs)
    for ours, theirs in ((found, expected), (gradient, expected_gradient)):
        assert (ours - theirs).abs().max() < 2e-6 * theirs.abs().max()


def test_others_stay_as_they_are() -> None:
    class LlamaDecoderLayer(torch.nn.Module):
        """Somebody else's."""

    unjoined, windowed = frozen(build_model()), frozen(mistral(sliding_window=8))
    join_projections(windowed)
    for layer in (LlamaDecoderLayer(), unjoined.model.layers[0], windowed.model.layers[0]):
        assert lean_forward(layer) is None
