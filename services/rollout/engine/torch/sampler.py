"""From logits to tokens and their logprobs.

One uniform number per token, out of the sequence's own generator, is mapped through the inverse of the cumulative
distribution: what a sequence draws does not depend on who else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from services.rollout.engine import SamplingParams
from services.rollout.engine.torch.adjust import adjusted
from services.rollout.engine.torch.sequence import Sequence

# Ids whose masses are summed first.
_BLOCK = 256


class Sampled(NamedTuple):
    """One token with its raw logprob, and the most likely tokens with theirs."""

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]


def sample(logits_NV: Tensor, sequences: SequenceOf[Sequence], uniforms: SequenceOf[float]) -> list[Sampled]:
    """The next token of each sequence, from float32 logits and the number that it drew.

    Logprobs are those of the model's own distribution: neither tempered nor adjusted.
    """
    drawn_NV = adjusted(logits_NV, [sequence.adjustment for sequence in sequences])
    rows = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature > 0]
    if len(rows) == len(sequences):
        # Not the greatest of each row as well: on a CPU that takes as long as all else here.
        ids_N = draw(drawn_NV, [sequence.sampling for sequence in sequences], uniforms)
    else:
        ids_N = torch.argmax(drawn_NV, dim=-1)
        if rows:
            params, drawn = [sequences[row].sampling for row in rows], [uniforms[row] for row in rows]
            ids_N[rows] = draw(drawn_NV[rows], params, drawn)
    lse_N = torch.logsumexp(logits_NV, dim=-1)
    logprobs = (logits_NV.gather(1, ids_N[:, None])[:, 0] - lse_N).tolist()
    top = _top_logprobs(logits_NV, lse_N, [sequence.sampling.num_logprobs for sequence in sequences])
    return [Sampled(*row) for row in zip(ids_N.tolist(), logprobs, top, strict=True)]


def draw(logits_NV: Tensor, params: SequenceOf[SamplingParams], uniforms: SequenceOf[float]) -> Tensor:
    """Ids [N] drawn at the temperatures, min_p, top_k and top_p of `params` (none greedy)."""
    device = logits_NV.device
    scaled_NV = scale(logits_NV, torch.tensor([each.temperature for each in params], device=device))
    for row, each in enumerate(params):
        scaled_V = scaled_NV[row]
        if each.min_p:
            # The likeliest one's is 0.
            scaled_V.masked_fill_(scaled_V < math.log(each.min_p), float("-inf"))
        if each.top_k or each.top_p < 1:
            scaled_V.masked_fill_(scaled_V < _threshold(scaled_V, each.top_k, each.top_p), float("-inf"))
    return invert(scaled_NV, torch.tensor(uniforms, dtype=torch.float64, device=device))


def scale(logits_NV: Tensor, temperatures_N: Tensor) -> Tensor:
    """The greatest is 0 after this, so that a temperature near 0 overflows to -inf elsewhere and never to NaN."""
    return (logits_NV - logits_NV.amax(dim=-1, keepdim=True)) / temperatures_N[:, None]


def invert(scaled_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """Ids [N] at which the cumulative distributions pass the uniform numbers, float64.

    By blocks of ids, and then within one: a sum over a whole vocabulary has its terms one after the other.
    """
    masses_NV = torch.softmax(scaled_NV, dim=-1)
    num_fill = -masses_NV.shape[1] % _BLOCK
    blocks_NKB = F.pad(masses_NV, (0, num_fill)).view(len(masses_NV), -1, _BLOCK)
    # float64: 50,000 float32 terms would lose the tail.
    cdf_NK = blocks_NKB.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    targets_N1 = uniforms_N[:, None] * cdf_NK[:, -1:]
    block_N1 = _passed(cdf_NK, targets_N1)
    before_N1 = torch.where(block_N1 > 0, cdf_NK.gather(1, (block_N1 - 1).clamp_(min=0)), 0.0)
    block_NB = blocks_NKB.gather(1, block_N1[:, :, None].expand(-1, -1, _BLOCK))[:, 0]
    within_N1 = _passed(block_NB.cumsum(dim=-1, dtype=torch.float64), targets_N1 - before_N1)
    return (block_N1 * _BLOCK + within_N1)[:, 0]


def _passed(cdf_NK: Tensor, targets_N1: Tensor) -> Tensor:
    """The first places [N, 1] whose cumulative mass exceeds the target: what has mass 0 is never drawn."""
    # A target that was rounded up to all there is would pass the end.
    below_N1 = torch.nextafter(cdf_NK[:, -1:], torch.zeros_like(targets_N1))
    return torch.searchsorted(cdf_NK, torch.minimum(targets_N1, below_N1), right=True)


def _threshold(logits_V: Tensor, top_k: int, top_p: float) -> Tensor:
    """The least logit that is kept: the k-th, or the last of the fewest whose mass (among those k) reaches top_p."""
    if top_k:
        top = torch.topk(logits_V, min(top_k, len(logits_V))).values
        total = torch.logsumexp(top, dim=-1)
    else:
        total = torch.logsumexp(logits_V, dim=-1)
        # Enough candidates for most distributions; sorting a whole vocabulary takes as long as a small model's forward.
        top = torch.topk(logits_V, min(256, len(logits_V))).values
        while torch.exp(top - total).sum() < top_p and len(top) < len(logits_V):
            top = torch.topk(logits_V, min(8 * len(top), len(logits_V))).values
    mass = torch.exp(top - total).cumsum(dim=-1)
    return top[(mass < top_p).sum().clamp(max=len(top) - 1)]


def _top_logprobs(logits_NV: Tensor, lse_N: Tensor, wanted: SequenceOf[int]) -> list[tuple[tuple[int, float], ...]]:
    most = max(wanted)
    if not most:
        return [()] * len(wanted)
    values_NK, ids_NK = torch.topk(logits_NV, most, dim=-1)
    rows = zip(ids_NK.tolist(), (values_NK - lse_N[:, None]).tolist(), wanted, strict=True)
    return [tuple(zip(ids[:num], logprobs[:num], strict=True)) for ids, logprobs, num in rows]
