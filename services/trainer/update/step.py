"""One update: gradient, proof, Adam.

Runs with torch and transformers alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foundry.model.cartridge import TrainableCartridge
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective
from services.trainer.ranks.leader import Leader
from services.trainer.sample import Sample
from services.trainer.update.gradient import Signal, TokenScores, backward
from services.trainer.update.proof import Mismatch, prove


@dataclass(frozen=True, slots=True)
class Update:
    """What one step did."""

    loss: float
    num_tokens: int
    grad_norm: float
    entropy: float
    # Between the rollout's logprobs of the sampled tokens and the trainer's own, under the same version.
    policy_mismatch_kl: float
    policy_mismatch_max: float
    mismatch_by_server: Mapping[str, Mismatch]


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
        self._lm = lm
        self.cartridge = cartridge
        self._objective = objective
        self._micro_batch_tokens = micro_batch_tokens
        self._policy_mismatch_threshold = policy_mismatch_threshold
        self._leader = leader
        self.optimiser = torch.optim.Adam([cartridge.master_L2GRD], lr=learning_rate)

    def run(self, samples: Sequence[Sample], signals: Sequence[Signal]) -> Update:
        """Train on the samples. Raises PolicyMismatch, and changes nothing, if they are not this policy's."""
        self.optimiser.zero_grad(set_to_none=True)
        scores = self._backward(samples, signals)
        proof = prove(samples, scores.chosen_logprob_N, self._policy_mismatch_threshold)
        self.optimiser.step()
        return Update(
            loss=scores.loss_N.mean().item(),
            num_tokens=scores.loss_N.shape[0],
            grad_norm=_norm(self.cartridge.master_L2GRD.grad),
            entropy=scores.entropy_N.mean().item(),
            policy_mismatch_kl=proof.total.kl,
            policy_mismatch_max=proof.total.largest,
            mismatch_by_server=proof.by_server,
        )

    def _backward(self, samples: Sequence[Sample], signals: Sequence[Signal]) -> TokenScores:
        compute = backward if self._leader is None else self._leader.backward
        return compute(
            self._lm,
            self.cartridge,
            self._objective,
            samples,
            signals,
            num_tokens=sum(len(sample.answer_ids) for sample in samples),
            micro_batch_tokens=self._micro_batch_tokens,
        )


def _norm(grad: Tensor | None) -> float:
    return math.nan if grad is None else grad.norm().item()
