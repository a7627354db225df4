"""Many sequences in one forward, none of which sees another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from foundry.model.attention import attend_masked, causal_mask, check_lengths

# Sequences behind one prefix attend together up to so many tokens, each other's keys masked: for short ones a call
# costs more than the scores that are thrown away. A longer sequence attends alone.
_TOGETHER_TOKENS = 256


@dataclass(frozen=True, slots=True)
class _Group:
    """Consecutive tokens that attend in one call: to their prefix, by layer [2, G, P, D], and to what the mask says."""

    begin: int
    end: int
    prefix: list[tuple[Tensor, ...]] | None
    mask_SK: Tensor


class PackedAttention:
    """Sequences laid end to end; each sees the whole of its prefix and, causally, itself."""

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        prefixes: Sequence[Tensor | None],
        max_tokens: int,
        device: torch.device,
    ) -> None:
        lengths = [len(sequence) for sequence in sequences]
        prefix_lengths = check_lengths(sequences, prefixes, max_tokens)
        self.positions_T = torch.cat(
            [
                torch.arange(num_prefix, num_prefix + num_tokens)
                for num_tokens, num_prefix in zip(lengths, prefix_lengths, strict=True)
            ]
        ).to(device)
        # Taken apart once: the gradient of indexing is a whole prefix of zeros for every layer and group.
        layers = {
            id(prefix): [layer.unbind(0) for layer in prefix.unbind(0)] for prefix in prefixes if prefix is not None
        }
        begins = [0, *accumulate(lengths)]
        self._groups = [
            _Group(
                begins[some.start],
                begins[some.stop],
                layers.get(id(prefixes[some.start])),
                _mask(lengths[some], prefix_lengths[some.start], device),
            )
            for some in _together(lengths, prefixes)
        ]

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        outputs = []
        for group in self._groups:
            own = slice(group.begin, group.end)
            k_GKD, v_GKD = k_GTD[:, own], v_GTD[:, own]
            if group.prefix is not None:
                k_GPD, v_GPD = group.prefix[layer]
                k_GKD = torch.cat([k_GPD, k_GKD], dim=1)
                v_GKD = torch.cat([v_GPD, v_GKD], dim=1)
            outputs.append(attend_masked(q_HTD[:, own], k_GKD, v_GKD, group.mask_SK, scale))
        return torch.cat(outputs, dim=1).transpose(0, 1)


def _together(lengths: Sequence[int], prefixes: Sequence[Tensor | None]) -> Iterator[slice]:
    """Consecutive sequences behind the same prefix."""
    begin, num_tokens = 0, 0
    for index, length in enumerate(lengths):
        if index > begin and (prefixes[index] is not prefixes[begin] or num_tokens + length > _TOGETHER_TOKENS):
            yield slice(begin, index)
            begin, num_tokens = index, 0
        num_tokens += length
    yield slice(begin, len(lengths))


def _mask(lengths: Sequence[int], num_prefix: int, device: torch.device) -> Tensor:
    """Bool [S, P + S]: the prefix, and of its own sequence each token's past."""
    if len(lengths) == 1:
        return causal_mask(lengths[0], num_prefix, device)
    mask_SK = torch.zeros(sum(lengths), num_prefix + sum(lengths), dtype=torch.bool)
    mask_SK[:, :num_prefix] = True
    begin = 0
    for length in lengths:
        end = begin + length
        mask_SK[begin:end, num_prefix + begin : num_prefix + end] = causal_mask(length, 0, mask_SK.device)
        begin = end
    return mask_SK.to(device)
