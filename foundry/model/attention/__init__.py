"""Attention as the foundry needs it: a plan, handed to the forward as a keyword argument, says who sees whom.

One function is registered with the attention interface of `transformers`; no modelling file is copied.
`packed`, `flex` and `prefill` are plans of the library, the built-in engine has its own. Shape suffixes:
`foundry.model.lm`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foundry.errors import InvalidArgument, ModelUnsupported

ATTENTION = "foundry"
# What models pass to their attention function beside the usual, and what would silently be left out.
UNSUPPORTED_ATTENTION = ("sliding_window", "softcap", "s_aux")


class AttentionPlan(Protocol):
    """Who attends to whom in one forward over packed tokens."""

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        """Return the attention output [T, H, D] of one layer. Keys come after RoPE."""
        ...


class LayerAttention(ABC):
    """The part of a `LayeredPlan` that one layer has: what its compiled code is given."""

    @abstractmethod
    def attend(self, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        """Return the attention output [T, H, D]. Keys come after RoPE."""


class LayeredPlan(ABC):
    """A plan under which layers run compiled, see `foundry.model.layers`."""

    # Whether lengths are few enough that layers are compiled for each: kernels are a third faster for it.
    fixed_lengths = False
    # Whether backward computes each layer anew, of its input alone, instead of keeping what came between.
    recompute = False

    @abstractmethod
    def layer(self, index: int) -> LayerAttention:
        """One layer's part. Not in compiled code."""


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    plan: AttentionPlan | LayerAttention,
    **extras: Any,
) -> tuple[Tensor, None]:
    if wanted := [name for name in UNSUPPORTED_ATTENTION if extras.get(name) is not None]:
        raise ModelUnsupported(f"layer {module.layer_idx} asks for attention with {', '.join(wanted)}")
    if isinstance(plan, LayerAttention):
        # The layer's index is not read: compiled code that reads it is compiled once for every layer.
        out_THD = plan.attend(query[0], key[0], value[0], scaling)
    else:
        out_THD = plan.attend(module.layer_idx, query[0], key[0], value[0], scaling)  # type: ignore[arg-type]
    return out_THD.unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)


def check_lengths(sequences: Sequence[Sequence[int]], prefixes: Sequence[Tensor | None], max_tokens: int) -> list[int]:
    """Tokens in each prefix KV [L, 2, G, P, D]. Raises InvalidArgument for an empty or too long sequence."""
    prefix_lengths = [0 if prefix is None else prefix.shape[3] for prefix in prefixes]
    for index, (sequence, num_prefix) in enumerate(zip(sequences, prefix_lengths, strict=True)):
        if not sequence:
            raise InvalidArgument(f"sequence {index} is empty: it needs at least one token")
        if num_prefix + len(sequence) > max_tokens:
            raise InvalidArgument(
                f"sequence {index} has {len(sequence)} tokens behind a prefix of {num_prefix}: "
                f"the model's context is {max_tokens}"
            )
    return prefix_lengths


def causal_mask(num_tokens: int, num_prefix: int, device: torch.device) -> Tensor:
    """Bool [S, P + S]: row i sees the prefix and tokens 0..i."""
    return torch.ones(num_tokens, num_prefix + num_tokens, dtype=torch.bool, device=device).tril(num_prefix)


def attend_masked(q_HSD: Tensor, k_GKD: Tensor, v_GKD: Tensor, mask_SK: Tensor, scale: float) -> Tensor:
    """Grouped-query attention [H, S, D] of tokens that are in one call, whoever the mask lets see whom."""
    if q_HSD.is_cuda:
        # The kernel that holds no scores [H, S, K] takes as many heads of keys as of queries.
        k_GKD, v_GKD = (each.repeat_interleave(q_HSD.shape[0] // each.shape[0], dim=0) for each in (k_GKD, v_GKD))
    return F.scaled_dot_product_attention(
        q_HSD.unsqueeze(0), k_GKD.unsqueeze(0), v_GKD.unsqueeze(0), attn_mask=mask_SK, scale=scale, enable_gqa=True
    )[0]
