"""Many sequences in one forward, none of which sees another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foundry.errors import InvalidArgument
from foundry.model.attention import attend_masked, causal_mask


class PackedAttention:
    """Sequences laid end to end; each sees the whole of its prefix and, causally, itself."""

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        prefixes: Sequence[Tensor | None],
        max_tokens: int,
        device: torch.device,
    ) -> None:
        # Taken apart once: the gradient of indexing is a whole prefix of zeros for every layer and segment.
        layers = {
            id(prefix): [layer.unbind(0) for layer in prefix.unbind(0)] for prefix in prefixes if prefix is not None
        }
        self.prefix_layers = [None if prefix is None else layers[id(prefix)] for prefix in prefixes]
        self.segments: list[tuple[int, int]] = []
        self.masks_SK: list[Tensor] = []
        positions: list[Tensor] = []
        masks: dict[tuple[int, int], Tensor] = {}
        begin = 0
        for index, (sequence, prefix_L2GPD) in enumerate(zip(sequences, prefixes, strict=True)):
            num_prefix, num_tokens = 0 if prefix_L2GPD is None else prefix_L2GPD.shape[3], len(sequence)
            if num_tokens == 0:
                raise InvalidArgument(f"sequence {index} is empty: it needs at least one token")
            if num_prefix + num_tokens > max_tokens:
                raise InvalidArgument(
                    f"sequence {index} has {num_tokens} tokens behind a prefix of {num_prefix}: "
                    f"the model's context is {max_tokens}"
                )
            self.segments.append((begin, begin + num_tokens))
            positions.append(torch.arange(num_prefix, num_prefix + num_tokens, device=device))
            shape = (num_tokens, num_prefix)
            if shape not in masks:
                masks[shape] = causal_mask(num_tokens, num_prefix, device)
            self.masks_SK.append(masks[shape])
            begin += num_tokens
        self.positions_T = torch.cat(positions)

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        outputs = []
        for (begin, end), prefix, mask_SK in zip(self.segments, self.prefix_layers, self.masks_SK, strict=True):
            k_GKD, v_GKD = k_GTD[:, begin:end], v_GTD[:, begin:end]
            if prefix is not None:
                k_GPD, v_GPD = prefix[layer]
                k_GKD = torch.cat([k_GPD, k_GKD], dim=1)
                v_GKD = torch.cat([v_GPD, v_GKD], dim=1)
            outputs.append(attend_masked(q_HTD[:, begin:end], k_GKD, v_GKD, mask_SK, scale))
        return torch.cat(outputs, dim=1).transpose(0, 1)
