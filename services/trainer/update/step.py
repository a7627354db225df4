"""One update: gradient, proof, Adam.

Runs with torch and transformers alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foundry.model.cartridge import TrainableCartridge
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective
from services.trainer.ranks.leader import Leader
from services.trainer.sample import Sample
from services.trainer.update.gradient import Batch, Signal, backward
from services.trainer.update.proof import Proof, prove


@dataclass(frozen=True, slots=True)
class Update:
    """What one step did."""

    loss: float
    num_tokens: int
    grad_norm: float
    entropy: float
    # None where the samples were not to be proved.
    proof: Proof | None


class TrainingStep:
    """The cartridge in training and its optimiser."""

    def __init__(
        self,
        lm: FrozenLM,
        cartridge: TrainableCartridge,
        objective: Objective,
        *,
        learning_rate: float,
        micro_batch_tokens: int,
        policy_mismatch_threshold: float,
        leader: Leader | None = None,
    ) -> None:
        """With a `leader` all ranks of its group compute the gradient together."""
        self.lm, self.cartridge, self.objective = lm, cartridge, objective
        self.optimiser = torch.optim.Adam([cartridge.master_L2GRD], lr=learning_rate)
        self._micro_batch_tokens = micro_batch_tokens
        self._policy_mismatch_threshold = policy_mismatch_threshold
        self._backward = backward if leader is None else leader.backward

    def run(self, samples: Sequence[Sample], signals: Sequence[Signal], *, prove_policy: bool) -> Update:
        """Train on the samples.

        With `prove_policy` raises PolicyMismatch, and changes nothing, if they are not this policy's. Without it their
        logprobs are not looked at: that is for samples which nobody says are the policy's.
        """
        self.optimiser.zero_grad(set_to_none=True)
        num_tokens = sum(len(sample.answer_ids) for sample in samples)
        batch = Batch(samples, signals, self.objective, num_tokens, self._micro_batch_tokens)
        scores = self._backward(self.lm, self.cartridge, batch)
        proof = prove(samples, scores.chosen_logprob_N, self._policy_mismatch_threshold) if prove_policy else None
        self.optimiser.step()
        return Update(
            loss=scores.loss_N.mean().item(),
            num_tokens=num_tokens,
            grad_norm=_norm(self.cartridge.master_L2GRD.grad),
            entropy=scores.entropy_N.mean().item(),
            proof=proof,
        )


def _norm(grad: Tensor | None) -> float:
    return math.nan if grad is None else grad.norm().item()
