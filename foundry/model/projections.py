"""Projections of one input as one product: queries, keys and values, and both inputs of the MLP's product.

A small product does not fill a GPU, and each costs a launch. Layers are used as they are: each of their linear modules
becomes a part of a whole, which is computed for whoever asks first and kept until the last has had its part. In
compiled code nothing of that is left but one product, with one for the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# What modules of decoders call projections of the same input, in the order in which they ask.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def join_projections(model: nn.Module) -> None:
    """Join what belongs together wherever it is plain linear modules, with their weights in one tensor."""
    for module in list(model.modules()):
        for names in _TOGETHER:
            linears = [getattr(module, name, None) for name in names]
            if all(type(each) is nn.Linear for each in linears):
                _join(module, names, linears)  # type: ignore[arg-type]


def joined(part: nn.Module) -> nn.Module | None:
    """The one product that a projection is a part of; None if it is not."""
    return part.whole.linear if isinstance(part, _Part) else None


def _join(module: nn.Module, names: Sequence[str], linears: Sequence[nn.Linear]) -> None:
    whole = _Whole(linears)
    for index, name in enumerate(names):
        # The linear modules go, and with them the memory of their weights.
        setattr(module, name, _Part(whole, index))


class _Whole(nn.Module):
    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        biases: list[Any] = [each.bias for each in linears]
        self.sizes = [each.out_features for each in linears]
        # Without memory of its own, which it is given.
        self.linear = nn.Linear(linears[0].in_features, sum(self.sizes), bias=biases[0] is not None, device="meta")
        with torch.no_grad():
            self.linear.weight = nn.Parameter(torch.cat([each.weight for each in linears]), requires_grad=False)
            if biases[0] is not None:
                self.linear.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        # The last input with what came of it, for those who have not had their part.
        self.kept: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def part(self, inputs: Tensor, index: int) -> Tensor:
        kept = self.kept
        if kept is None or kept[0] is not inputs:
            kept = inputs, torch.split(self.linear(inputs), self.sizes, dim=-1)
        self.kept = kept if index + 1 < len(self.sizes) else None
        return kept[1][index]


class _Part(nn.Module):
    def __init__(self, whole: _Whole, index: int) -> None:
        super().__init__()
        self.whole, self.index = whole, index

    def forward(self, inputs: Tensor) -> Tensor:
        return self.whole.part(inputs, self.index)
