"""Many sequences in one forward, none of which sees another, with plain operators: what faster plans are judged by, and
what devices use that have none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from foundry.model.attention import attend_masked, causal_mask, check_lengths


class PackedAttention:
    """Sequences laid end to end; each sees the whole of its prefix and, causally, itself."""

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        prefixes: Sequence[Tensor | None],
        max_tokens: int,
        device: torch.device,
    ) -> None:
        self._device = device
        lengths = [len(sequence) for sequence in sequences]
        self._prefix_lengths = check_lengths(sequences, prefixes, max_tokens)
        self.positions_T = packed_positions(lengths, self._prefix_lengths, device)
        self._spans = [slice(begin, end) for begin, end in pairwise([0, *accumulate(lengths)])]
        layers = {id(prefix): layers_of(prefix) for prefix in prefixes if prefix is not None}
        self._prefixes = [layers.get(id(prefix)) for prefix in prefixes]

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        outputs = []
        for own, prefix, num_prefix in zip(self._spans, self._prefixes, self._prefix_lengths, strict=True):
            k_GKD, v_GKD = k_GTD[:, own], v_GTD[:, own]
            if prefix is not None:
                k_GPD, v_GPD = prefix[layer]
                k_GKD = torch.cat([k_GPD, k_GKD], dim=1)
                v_GKD = torch.cat([v_GPD, v_GKD], dim=1)
            mask_SK = causal_mask(own.stop - own.start, num_prefix, self._device)
            outputs.append(attend_masked(q_HTD[:, own], k_GKD, v_GKD, mask_SK, scale))
        return torch.cat(outputs, dim=1).transpose(0, 1)


def packed_positions(lengths: Sequence[int], prefix_lengths: Sequence[int], device: torch.device) -> Tensor:
    """Of all tokens [T]: token i of a sequence behind P others is at P + i."""
    spans = zip(lengths, prefix_lengths, strict=True)
    return torch.cat([torch.arange(num_prefix, num_prefix + length) for length, num_prefix in spans]).to(device)


def layers_of(prefix_L2GPD: Tensor) -> list[tuple[Tensor, ...]]:
    """Keys and values [G, P, D] by layer. Taken apart once: the gradient of indexing is a whole prefix of zeros."""
    return [layer.unbind(0) for layer in prefix_L2GPD.unbind(0)]
