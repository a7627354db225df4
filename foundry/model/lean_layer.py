"""Decoder layers of the Llama family in a seventh of their operators: on a CPU a step of decoding spends as long on
what lies between the products as on them.

The numbers are those of the layers of `transformers`, whose modules and weights these are; layers of other kinds stay
as they are. Shape suffixes: `foundry.model.lm`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foundry.model.attention import LayerAttention
from foundry.model.projections import joined

# All of them: norm, attention with rotated queries and keys, norm, gated MLP; Qwen3's norms queries and keys too.
_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


def lean_forward(layer: Any) -> Callable[..., Tensor] | None:
    """What does as the layer's forward does, of the arguments that a frozen model is called with; None where that is
    not known. The layer's projections are joined."""
    kind = type(layer)
    if kind.__name__ not in _LAYERS or not kind.__module__.startswith("transformers.models."):
        return None
    attention = layer.self_attn
    if joined(attention.q_proj) is None or joined(layer.mlp.gate_proj) is None:
        return None
    # Which is refused where attention is asked for.
    if getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)) is not None:
        return None
    return _Lean(layer).forward


class _Lean:
    """What a layer is made of, looked up once: attributes of modules are slow."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.scale, self.head_dim = attention.layer_idx, attention.scaling, attention.head_dim
        self.num_heads = attention.config.num_attention_heads
        self.num_rotated = self.num_heads + attention.config.num_key_value_heads
        self.norms = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        head_norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.head_norms = [_norm(each) for each in head_norms if each is not None]
        self.qkv: Any = joined(attention.q_proj)
        self.out = attention.o_proj
        self.gate_up: Any = joined(mlp.gate_proj)
        self.down, self.activation = mlp.down_proj, mlp.act_fn

    def forward(
        self, hidden_1TE: Tensor, *, position_embeddings: tuple[Tensor, Tensor], plan: Any, **_unused: Any
    ) -> Tensor:
        hidden_TE = hidden_1TE[0]
        cos_T1D, sin_T1D = (each[0].unsqueeze(1) for each in position_embeddings)
        num_heads, num_rotated = self.num_heads, self.num_rotated
        # Queries, keys and values, head by head.
        qkv_TAD = self.qkv(self.norms[0](hidden_TE)).view(len(hidden_TE), -1, self.head_dim)
        qk_TAD = qkv_TAD[:, :num_rotated]
        if self.head_norms:
            parts = qk_TAD[:, :num_heads], qk_TAD[:, num_heads:]
            qk_TAD = torch.cat([norm(part) for norm, part in zip(self.head_norms, parts, strict=True)], dim=1)
        first, second = qk_TAD.chunk(2, dim=-1)
        turned_TAD = torch.cat((-second, first), dim=-1)
        rotated_ATD = torch.addcmul(qk_TAD * cos_T1D, turned_TAD, sin_T1D).transpose(0, 1)
        q_HTD, k_GTD = rotated_ATD[:num_heads], rotated_ATD[num_heads:]
        v_GTD = qkv_TAD[:, num_rotated:].transpose(0, 1)
        if isinstance(plan, LayerAttention):
            out_THD = plan.attend(q_HTD, k_GTD, v_GTD, self.scale)
        else:
            out_THD = plan.attend(self.index, q_HTD, k_GTD, v_GTD, self.scale)
        hidden_TE = hidden_TE + self.out(out_THD.flatten(1))
        gate, up = self.gate_up(self.norms[1](hidden_TE)).chunk(2, dim=-1)
        layer_out_TE: Tensor = hidden_TE + self.down(self.activation(gate) * up)
        return layer_out_TE.unsqueeze(0)


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    weight, epsilon = module.weight.detach(), module.variance_epsilon
    return lambda inputs: F.rms_norm(inputs, weight.shape, weight, epsilon)
