"""Products with frozen weights on a CPU: weights are laid out for the kernel once, not at every product.

With few rows, as in decoding, a product reads its weights once and computes little: to copy them into the kernel's
order first takes as long as all the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Rows that the layout is for. It is as good as any other for fewer, and no worse than none for more.
_ROWS = 512


def pack_products(model: nn.Module) -> None:
    """Let packed weights stand in for those of every linear module, whose memory goes unless somebody else holds it.

    Only where there is a kernel for it: in float32 on a CPU, with a torch that has MKL.
    """
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return
    for module in list(model.modules()):
        for name, linear in list(module.named_children()):
            if (
                type(linear) is nn.Linear
                and linear.weight.device.type == "cpu"
                and linear.weight.dtype == torch.float32
            ):
                setattr(module, name, PackedLinear(linear))


def _is_float32_on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32


class PackedLinear(nn.Module):
    """A linear module whose weights and bias get no gradient. Its inputs do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._forward = _Packed(linear.weight.detach())
        # Made by the first backward.
        self._backward: _Packed | None = None
        self._bias = linear.bias.detach() if linear.bias is not None else None

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., out] of inputs [..., in]."""
        if inputs.requires_grad and torch.is_grad_enabled():
            outputs: Tensor = _Product.apply(inputs, self)  # type: ignore[no-untyped-call]
            return outputs
        return self._forward.product(inputs, self._bias)

    def gradient(self, of_outputs: Tensor) -> Tensor:
        """The gradient of the inputs."""
        if self._backward is None:
            # The weights themselves, transposed and to the bit: sums of one term.
            unit = torch.eye(self.in_features)
            self._backward = _Packed(self._forward.product(unit, None))
        return self._backward.product(of_outputs, None)


class _Packed:
    def __init__(self, weight: Tensor) -> None:
        self.in_features = weight.shape[1]
        self._packed: Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight.contiguous(), _ROWS)
        # Where the operator has packed weights it asks the plain ones for their shape only.
        self._shape = torch.empty(1).expand(weight.shape)

    def product(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        # It would take the plain weights if this were not the number of rows.
        rows = inputs.numel() // self.in_features
        outputs: Tensor = torch.ops.mkl._mkl_linear(inputs.contiguous(), self._packed, self._shape, bias, rows)
        return outputs


class _Product(torch.autograd.Function):
    # The operator has no derivative of its own.
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, linear: PackedLinear) -> Tensor:
        ctx.linear = linear
        return linear._forward.product(inputs, linear._bias)

    @staticmethod
    def backward(ctx: Any, of_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.linear.gradient(of_outputs), None
