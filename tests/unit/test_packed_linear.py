"""Packed products are the plain ones, forward and backward, and nothing keeps the plain weights."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from foundry.model.packed_linear import PackedLinear, pack_products

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL")


def linear(in_features: int, out_features: int, *, bias: bool) -> nn.Linear:
    torch.manual_seed(in_features + out_features)
    return nn.Linear(in_features, out_features, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 96), (576, 1536), (1, 1), (33, 7)])
@pytest.mark.parametrize("shape", [(1,), (2, 1), (1, 16), (1, 700), (3, 5)])
def test_outputs_and_gradients_are_those_of_the_plain_module(
    shape: tuple[int, ...], in_features: int, out_features: int, bias: bool
) -> None:
    plain = linear(in_features, out_features, bias=bias)
    packed = PackedLinear(plain)
    inputs = torch.randn(*shape, in_features).requires_grad_()
    expected, found = plain(inputs), packed(inputs)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(packed(inputs), expected)
    of_outputs = torch.randn(expected.shape)
    (expected_gradient,) = torch.autograd.grad(expected, inputs, of_outputs)
    (gradient,) = torch.autograd.grad(found, inputs, of_outputs)
    torch.testing.assert_close(gradient, expected_gradient)


def test_inputs_may_lie_in_any_order() -> None:
    plain = linear(64, 96, bias=True)
    inputs = torch.randn(64, 10).t()
    of_outputs = torch.randn(96, 10).t()
    packed = PackedLinear(plain)
    torch.testing.assert_close(packed(inputs), plain(inputs))
    torch.testing.assert_close(packed.gradient(of_outputs), of_outputs @ plain.weight)


def test_weights_come_back_to_the_bit() -> None:
    plain = linear(576, 1536, bias=True)
    assert PackedLinear(plain)._forward.product(torch.eye(576), None).t().equal(plain.weight)


def test_plain_weights_are_not_kept() -> None:
    model = nn.Sequential(linear(64, 96, bias=True), nn.Sequential(linear(96, 64, bias=False)))
    kept = [weakref.ref(parameter) for parameter in model.parameters()]
    inputs = torch.randn(3, 64)
    expected = model(inputs)
    pack_products(model)
    assert not list(model.parameters())
    assert [each() is None for each in kept] == [True] * 3
    torch.testing.assert_close(model(inputs), expected)


def test_other_dtypes_stay() -> None:
    model = nn.Sequential(linear(64, 96, bias=True)).to(torch.bfloat16)
    pack_products(model)
    assert type(model[0]) is nn.Linear
