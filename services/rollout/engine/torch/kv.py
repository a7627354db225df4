"""KV of conversations: one slot per running sequence, all slots of a layer in one tensor.

Shape suffixes as in `foundry.model.lm`, and N slots, M tokens of a slot. Cartridges are never copied here.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from foundry.model.lm import FrozenLM


class SlotKV:
    """Keys (after RoPE) and values [N, G, M, D] for every layer."""

    def __init__(self, lm: FrozenLM, num_slots: int, max_tokens: int) -> None:
        spec = lm.spec
        self.num_slots, self.max_tokens = num_slots, max_tokens
        self.num_kv_heads, self.head_dim = spec.num_kv_heads, spec.head_dim
        self.dtype, self.device = lm.dtype, lm.device
        self.token_bytes = spec.kv_bytes_per_token(lm.dtype)
        shape = (spec.num_layers, 2, num_slots, spec.num_kv_heads, max_tokens, spec.head_dim)
        self._kv_L2NGMD = _zeros(shape, lm.dtype, lm.device)
        # Taken apart once: indexing costs as much as a small kernel, and there are dozens of layers.
        self.layers: list[tuple[Tensor, Tensor]] = [(kv[0], kv[1]) for kv in self._kv_L2NGMD]
        # In elements: from a layer to the next, from keys to values, from a slot, and from a kv head, to the next.
        self.layer_stride, self.value_stride, self.slot_stride, self.head_stride = self._kv_L2NGMD.stride()[:4]
        self._flat_layers = [(k.view(-1, spec.head_dim), v.view(-1, spec.head_dim)) for k, v in self.layers]

    def write_index(self, slots: Sequence[int], indices: Sequence[int]) -> Tensor:
        """Where `write` puts each token, given its slot and its index in the slot; for every kv head."""
        slots_T1 = torch.tensor(slots, device=self.device)[:, None]
        indices_T1 = torch.tensor(indices, device=self.device)[:, None]
        heads_G = torch.arange(self.num_kv_heads, device=self.device)
        return ((slots_T1 * self.num_kv_heads + heads_G) * self.max_tokens + indices_T1).flatten()

    def write(self, layer: int, index: Tensor, k_GTD: Tensor, v_GTD: Tensor) -> None:
        for flat, new_GTD in zip(self._flat_layers[layer], (k_GTD, v_GTD), strict=True):
            flat.index_copy_(0, index, new_GTD.transpose(0, 1).reshape(-1, self.head_dim))

    @property
    def first(self) -> Tensor:
        """All of it, for kernels that reckon with strides."""
        return self._kv_L2NGMD

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first tokens of one slot to another, in all layers."""
        self._kv_L2NGMD[:, :, target, :, :num_tokens] = self._kv_L2NGMD[:, :, source, :, :num_tokens]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros: a masked score multiplies a stale value by exactly 0, which only a finite value survives.

    On the CPU the memory comes as it is touched (torch.zeros would touch all of it).
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
