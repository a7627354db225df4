"""Importance weights: what an older version's answers count where the cartridge as it stands is trained.

The losses are exact over the vocabulary at each position, so that a position's own token is not drawn for them: what an
older version decided is which tokens stand before it. Those are weighted by how much likelier they are now, truncated
from above against the variance (https://doi.org/10.1198/106186008X320456).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


def importance_weights(log_ratio_N: Tensor, lengths: Sequence[int], most: float) -> Tensor:
    """Of answer tokens [N], sample after sample of `lengths` tokens, at most `most`; the first of each counts 1.

    `log_ratio_N` are the tokens' logprobs now less those under the version that gave them, in nats.
    """
    before = [F.pad(each[:-1], (1, 0)).cumsum(0) for each in torch.split(log_ratio_N, list(lengths))]
    return torch.cat(before).exp().clamp(max=most)


@dataclass(frozen=True, slots=True)
class Importance:
    """Over the answer tokens of a step."""

    mean_weight: float
    # Share of tokens.
    truncated: float

    @classmethod
    def of(cls, log_ratio_N: Tensor, lengths: Sequence[int], most: float) -> Self:
        weight_N = importance_weights(log_ratio_N, lengths, most)
        return cls(weight_N.mean().item(), (weight_N >= most).float().mean().item())
