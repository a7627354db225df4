"""Projections of one input as one product: the same numbers, fewer products, whoever asks in which order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM

from foundry.model import projections
from foundry.model.projections import join_projections
from tests.tiny import build_model


def mistral() -> Any:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=None,
    )
    return MistralForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": build_model,
    "qwen2": lambda: build_model("qwen2"),
    "qwen3": lambda: build_model("qwen3"),
    "mistral": mistral,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]().train(False).requires_grad_(False)


def logits_and_gradient(model: Any) -> tuple[Tensor, Tensor]:
    embedded = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    (gradient,) = torch.autograd.grad(logits.square().mean(), embedded)
    return logits.detach(), gradient


def test_numbers_are_the_same_and_products_fewer(model: Any) -> None:
    expected, gradient = logits_and_gradient(model)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    join_projections(model)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    products: list[int] = []
    for module in model.modules():
        if isinstance(module, projections._Whole):
            module.linear.register_forward_hook(lambda *made: products.append(made[2].shape[-1]))
    found, found_gradient = logits_and_gradient(model)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found_gradient, gradient, atol=1e-8, rtol=1e-4)
    # Queries, keys and values, and both inputs of the MLP's product, of two layers.
    assert products == [8 * 16, 2 * 128] * 2
    assert not any(module.kept for module in model.modules() if isinstance(module, projections._Whole))


def test_any_order_gives_the_same(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    names = ("q_proj", "k_proj", "v_proj")
    inputs, others = (torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3))
    plain = {name: getattr(attention, name) for name in names}
    expected = {(name, index): plain[name](each) for name in names for index, each in enumerate((inputs, others))}
    join_projections(model)
    for name in (*names, *reversed(names)):
        for index, each in enumerate((inputs, others)):
            torch.testing.assert_close(getattr(attention, name)(each), expected[name, index], atol=1e-6, rtol=1e-5)


def test_what_is_no_plain_linear_module_stays() -> None:
    class Scaled(nn.Linear):
        pass

    module = nn.Module()
    module.q_proj, module.k_proj, module.v_proj = nn.Linear(4, 4), Scaled(4, 4), nn.Linear(4, 4)
    before = (module.q_proj, module.k_proj, module.v_proj)
    join_projections(module)
    assert (module.q_proj, module.k_proj, module.v_proj) == before
