"""One sequence whose KV is kept: a document's, a piece at a time."""

from __future__ import annotations

from torch import Tensor

from foundry.model.attention import attend_masked, causal_mask


class PrefillAttention:
    """One sequence that attends to a KV buffer [L, 2, G, P, D] which this plan fills from `begin` on."""

    def __init__(self, kv_L2GPD: Tensor, begin: int, num_tokens: int) -> None:
        self.kv_L2GPD = kv_L2GPD
        self.begin, self.end = begin, begin + num_tokens
        self.mask_SK = causal_mask(num_tokens, begin, kv_L2GPD.device)

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        kv_2GPD = self.kv_L2GPD[layer]
        kv_2GPD[0, :, self.begin : self.end] = k_GTD
        kv_2GPD[1, :, self.begin : self.end] = v_GTD
        seen_2GKD = kv_2GPD[:, :, : self.end]
        return attend_masked(q_HTD, seen_2GKD[0], seen_2GKD[1], self.mask_SK, scale).transpose(0, 1)
