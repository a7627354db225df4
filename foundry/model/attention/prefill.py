"""One sequence whose KV is kept: a document's, a chunk at a time. Shape suffixes: `foundry.model.lm`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foundry.errors import InvalidArgument
from foundry.model.attention import LayeredPlan, attend_masked, causal_mask
from foundry.model.attention.flex import BLOCK, FlexLayer, Spans, block_mask
from foundry.model.attention.whole import reads_whole


class PrefillAttention:
    """Tokens that attend to what is before them in a KV buffer [L, 2, G, P, D], from `begin` on, and to themselves."""

    def __init__(self, kv_L2GPD: Tensor, begin: int, num_tokens: int) -> None:
        self.kv_L2GPD = kv_L2GPD
        self.begin, self.end = begin, begin + num_tokens
        self.positions_T = torch.arange(self.begin, self.end, device=kv_L2GPD.device)
        self.mask_SK = causal_mask(num_tokens, begin, kv_L2GPD.device)

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        kv_2GPD = self.kv_L2GPD[layer]
        kv_2GPD[0, :, self.begin : self.end] = k_GTD
        kv_2GPD[1, :, self.begin : self.end] = v_GTD
        seen_2GKD = kv_2GPD[:, :, : self.end]
        return attend_masked(q_HTD, seen_2GKD[0], seen_2GKD[1], self.mask_SK, scale).transpose(0, 1)

    def keep(self) -> None:
        """After the forward the tokens' KV is in the buffer: here it is already."""


@dataclass(frozen=True)
class FlexPrefillLayer(FlexLayer):
    """Keys and values of one layer so far, and room [2, G, T, D] for those of the chunk."""

    chunk_2GTD: Tensor

    def attend(self, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        self.chunk_2GTD.copy_(torch.stack([k_GTD, v_GTD]))
        return super().attend(q_HTD, k_GTD, v_GTD, scale)


class FlexPrefill(LayeredPlan):
    """The same in one compiled kernel, for a model whose layers `compile_layers` has seen; `begin` is a block's border.

    `positions_T` has a whole number of blocks, at least two (a dimension of one is compiled for by itself); what stands
    behind the tokens is seen by none of them.
    """

    def __init__(self, kv_L2GPD: Tensor, begin: int, num_tokens: int) -> None:
        """Raises InvalidArgument if `begin` is within a block."""
        if begin % BLOCK:
            raise InvalidArgument(f"a chunk begins at token {begin}: on CUDA its length must be a multiple of {BLOCK}")
        device = kv_L2GPD.device
        self._kv_L2GPD, self._begin, self._end = kv_L2GPD, begin, begin + num_tokens
        num_filled = max(2 * BLOCK, -(-num_tokens // BLOCK) * BLOCK)
        # Not beyond the last token: some models turn all positions another way once one is far out.
        self.positions_T = torch.arange(begin, begin + num_filled, device=device).clamp(max=self._end - 1)
        # Not in its place: compiled code may not write into what it reads by another name.
        num_layers, _, num_kv_heads, _, head_dim = kv_L2GPD.shape
        self._chunk_L2GTD = kv_L2GPD.new_empty((num_layers, 2, num_kv_heads, num_filled, head_dim))
        self._apart = reads_whole(kv_L2GPD)
        num_prefix_keys = 0 if self._apart else begin
        spans = Spans.of([num_filled], [(0, num_prefix_keys)], num_prefix_keys)
        self._mask = block_mask(spans.to(device), num_prefix_keys + num_filled)

    def layer(self, index: int) -> FlexPrefillLayer:
        if not self._begin:
            return FlexPrefillLayer(None, None, self._mask, False, self._chunk_L2GTD[index])
        k_GPD, v_GPD = self._kv_L2GPD[index, :, :, : self._begin]
        for prefix_GPD in (k_GPD, v_GPD):
            # A length of its own, else code is compiled for prefixes that happen to be as long as the chunk.
            torch._dynamo.maybe_mark_dynamic(prefix_GPD, 1)
        return FlexPrefillLayer(k_GPD, v_GPD, self._mask, self._apart, self._chunk_L2GTD[index])

    def keep(self) -> None:
        """After the forward: put the tokens' KV into the buffer."""
        num_tokens = self._end - self._begin
        self._kv_L2GPD[:, :, :, self._begin : self._end] = self._chunk_L2GTD[:, :, :, :num_tokens]
