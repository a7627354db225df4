"""One update: gradient, proof, Adam.

Runs with torch and transformers alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foundry.model.cartridge import Cartridge, TrainableCartridge
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective, TopK
from foundry.model.packing import CUDA_MICRO_BATCH_TOKENS
from services.trainer.ranks.leader import Leader
from services.trainer.sample import Sample
from services.trainer.update.gradient import Batch, Signal, backward
from services.trainer.update.importance import Importance
from services.trainer.update.proof import Proof, prove

# Samples of a quarter of a micro-batch each: a full one, one of three quarters, as long answers leave it, and a half
# one, which stands for all that is less (`foundry.model.attention.flex`).
_WARM_UP_SAMPLES, _WARM_UP_TOKENS = (4, 3, 2), CUDA_MICRO_BATCH_TOKENS // 4


@dataclass(frozen=True, slots=True)
class Update:
    """What one step did."""

    loss: float
    num_tokens: int
    grad_norm: float
    entropy: float
    # None where the samples were not to be proved.
    proof: Proof | None
    # None where the samples are the policy's as it stood, or nobody's: nothing was weighted.
    importance: Importance | None = None


class TrainingStep:
    """The cartridge in training and its optimiser."""

    def __init__(
        self,
        lm: FrozenLM,
        cartridge: TrainableCartridge,
        objective: Objective,
        *,
        learning_rate: float,
        micro_batch_tokens: int | None,
        policy_mismatch_threshold: float,
        max_grad_norm: float = 0.0,
        leader: Leader | None = None,
    ) -> None:
        """`micro_batch_tokens` None takes as many as fit into memory; `max_grad_norm` 0 leaves gradients as they are.

        With a `leader` all ranks of its group compute them.
        """
        self.lm, self.cartridge, self.objective = lm, cartridge, objective
        self.optimiser = torch.optim.Adam([cartridge.master_L2GRD], lr=learning_rate)
        self._micro_batch_tokens = micro_batch_tokens
        self._learning_rate, self._max_grad_norm = learning_rate, max_grad_norm
        self._policy_mismatch_threshold = policy_mismatch_threshold
        self._backward = backward if leader is None else leader.backward

    def run(
        self,
        samples: Sequence[Sample],
        signals: Sequence[Signal],
        *,
        prove_policy: bool,
        claimed: Cartridge | None = None,
        learning_rate_scale: float = 1.0,
    ) -> Update:
        """Train on the samples.

        With `prove_policy` raises PolicyMismatch, and changes nothing, if they are not this policy's, or not the older
        one's that they claim, `claimed`; what that one gave is weighted (`services.trainer.update.importance`). Without
        it their logprobs are not looked at: that is for samples which nobody says are the policy's.
        """
        self.optimiser.zero_grad(set_to_none=True)
        lengths = [len(sample.answer_ids) for sample in samples]
        claimed_L2GPD = None if claimed is None else claimed.kv_L2GPD.to(self.lm.device)
        batch = Batch(samples, signals, self.objective, sum(lengths), self._micro_batch_tokens, claimed_L2GPD)
        scores = self._backward(self.lm, self.cartridge, batch)
        proof = prove(samples, scores.claimed_logprob_N, self._policy_mismatch_threshold) if prove_policy else None
        importance = None
        if claimed is not None:
            log_ratio_N = scores.chosen_logprob_N - scores.claimed_logprob_N
            importance = Importance.of(log_ratio_N, lengths, self.objective.importance_ratio_max)
        grad_norm = self._clip()
        for group in self.optimiser.param_groups:
            group["lr"] = self._learning_rate * learning_rate_scale
        self.optimiser.step()
        return Update(
            loss=scores.loss_N.mean().item(),
            num_tokens=batch.num_tokens,
            grad_norm=grad_norm,
            entropy=scores.entropy_N.mean().item(),
            proof=proof,
            importance=importance,
        )

    def warm_up(self, num_tokens: int, *, stale: bool = False) -> None:
        """Compute what steps of about so many tokens compute and throw it away: on CUDA all of it is compiled at its
        first use. `stale`: what older versions have answered too."""
        lm = self.lm
        room = lm.spec.max_tokens - self.cartridge.header.num_tokens - 1
        num_answer = max(1, min(_WARM_UP_TOKENS - 1, room))
        sample = Sample([0], [0] * num_answer, [0.0] * num_answer, "", 0, truncated=True)
        signal: Signal = torch.zeros(num_answer, lm.spec.hidden_size, dtype=lm.dtype)
        if not self.objective.needs_hidden:
            num_top = (num_answer, self.objective.k)
            signal = TopK(torch.zeros(num_top).long(), torch.zeros(num_top), torch.zeros(num_answer))
        claimed_L2GPD = self.cartridge.cast().detach() if stale else None
        for num in _WARM_UP_SAMPLES:
            if num > _WARM_UP_SAMPLES[-1] and num_tokens <= (num - 1) * _WARM_UP_TOKENS:
                # No micro-batch is so long.
                continue
            tokens = num * num_answer
            self._backward(
                lm,
                self.cartridge,
                Batch([sample] * num, [signal] * num, self.objective, tokens, self._micro_batch_tokens, claimed_L2GPD),
            )
        self.optimiser.zero_grad(set_to_none=True)

    def _clip(self) -> float:
        """The gradient's norm before it is shortened."""
        master = self.cartridge.master_L2GRD
        if master.grad is None:
            return math.nan
        norm: Tensor = master.grad.norm()
        if self._max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_([master], self._max_grad_norm, norm)
        return norm.item()
