"""The proof that answers are the policy's: what each rollout server said of its tokens against the trainer's own word.

Servers are judged one by one: over all tokens together, a server that lies would be diluted by those that don't.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foundry.errors import PolicyMismatch
from services.trainer.sample import Sample


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Between the logprobs that came with answer tokens and the trainer's, under the version that they claim."""

    num_tokens: int
    # The estimator k3 of http://joschu.net/blog/kl-approx.html: never negative, low variance.
    kl: float
    # The largest |log ratio|.
    largest: float

    @classmethod
    def of(cls, log_ratio_N: Tensor) -> Mismatch:
        kl = (torch.expm1(log_ratio_N) - log_ratio_N).mean().item()
        return cls(log_ratio_N.numel(), kl, log_ratio_N.abs().max().item())

    def within(self, threshold: float) -> bool:
        """NaN is not."""
        return self.kl <= threshold


@dataclass(frozen=True, slots=True)
class Proof:
    """Over all samples of a step, and for each server's address."""

    total: Mismatch
    by_server: dict[str, Mismatch]


def prove(samples: Sequence[Sample], trainer_logprob_N: Tensor, threshold: float) -> Proof:
    """`trainer_logprob_N` is of all answer tokens, sample after sample.

    Raises PolicyMismatch, which names every server whose mismatch is above `threshold` (nats a token) or NaN.
    """
    claimed_N = torch.tensor(
        [logprob for sample in samples for logprob in sample.rollout_logprobs], device=trainer_logprob_N.device
    )
    # In float64: the ratios are near 1, and float32 would cancel to noise, even below zero.
    log_ratio_N = trainer_logprob_N.double() - claimed_N.double()
    by_sample = torch.split(log_ratio_N, [len(sample.answer_ids) for sample in samples])
    grouped: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        grouped.setdefault(sample.server, []).append(index)
    by_server = {
        server: Mismatch.of(torch.cat([by_sample[index] for index in indices])) for server, indices in grouped.items()
    }
    wrong = [
        _accusation(server, by_server[server], [(samples[index], by_sample[index]) for index in indices], threshold)
        for server, indices in grouped.items()
        if not by_server[server].within(threshold)
    ]
    if wrong:
        raise PolicyMismatch(
            f"nothing was trained: logprobs from {len(wrong)} of {len(by_server)} rollout servers are not those of the "
            f"version that they claim (policy_mismatch_threshold {threshold:.3g}). {'; '.join(wrong)}. Look at "
            "what these decode with before they are restarted; a mismatch on all of them points at the trainer instead"
        )
    return Proof(Mismatch.of(log_ratio_N), by_server)


def _accusation(server: str, mismatch: Mismatch, answers: Sequence[tuple[Sample, Tensor]], threshold: float) -> str:
    # There is one: the server's mean is that of its samples.
    first = next(sample for sample, log_ratio_N in answers if not Mismatch.of(log_ratio_N).within(threshold))
    return (
        f"Rollout {server or '(unknown)'} claimed version {first.version}, {first.digest}: policy_mismatch_kl "
        f"{mismatch.kl:.3g} and largest |log ratio| {mismatch.largest:.3g} over {mismatch.num_tokens} tokens, first in "
        f"{first.place or 'an answer of unknown place'}"
    )
