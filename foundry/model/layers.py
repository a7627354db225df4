"""Decoder layers that run compiled where a plan is made for it, and as they are under every other plan."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from foundry.model.attention import LayeredPlan
from foundry.model.lean_layer import lean_forward


def compile_layers(model: PreTrainedModel) -> None:
    """Give each layer of this model its part of a `LayeredPlan`, and compile its forward on CUDA.

    One compiled code serves all layers, all documents and, unless the plan's are fixed, all lengths of sequences and
    prefixes: weights and what the layer's part of a plan holds are its inputs, and no layer's index is read in it. Each
    kind of plan has its own, and forwards with gradients another than those without. Under other plans layers stay as
    they are.
    """
    # Codes: of each kind of plan, with and without gradients, prefixes and more than one token.
    torch._dynamo.config.recompile_limit = 32
    layers: Any = model.base_model.layers
    for index, layer in enumerate(layers):
        layer.forward = _forward(layer, index)


def _forward(layer: Any, index: int) -> Any:
    eager = layer.forward if _on_cuda(layer) else lean_forward(layer) or layer.forward
    # Nothing is compiled before the first call. A graph break would leave attention to a kernel that is not fused.
    compiled, compiled_fixed = (
        torch.compile(eager, dynamic=dynamic, fullgraph=True) if _on_cuda(layer) else eager for dynamic in (True, False)
    )

    def forward(*args: Any, plan: Any, **kwargs: Any) -> Any:
        if isinstance(plan, LayeredPlan):
            run = compiled_fixed if plan.fixed_lengths else compiled
            if plan.recompute and torch.is_grad_enabled():
                return checkpoint(run, *args, plan=plan.layer(index), use_reentrant=False, **kwargs)
            return run(*args, plan=plan.layer(index), **kwargs)
        return eager(*args, plan=plan, **kwargs)

    return forward


def _on_cuda(layer: torch.nn.Module) -> bool:
    return next(layer.parameters()).is_cuda
