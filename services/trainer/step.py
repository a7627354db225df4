"""One update: packed forward, loss, backward to the prefix, proof, Adam.

Runs with torch and transformers alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foundry.cartridge import TrainableCartridge
from foundry.lm import FrozenLM
from foundry.objectives import Distilled, Objective, TopK, distill
from services.trainer.proof import Mismatch, prove
from services.trainer.sample import Sample

# The teacher's word on one sample's answer: hidden states [N, E] or a TopK.
Signal = Tensor | TopK


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
    ) -> None:
        self._lm = lm
        self.cartridge = cartridge
        self._objective = objective
        self._micro_batch_tokens = micro_batch_tokens
        self._policy_mismatch_threshold = policy_mismatch_threshold
        self.optimiser = torch.optim.Adam([cartridge.master_L2GRD], lr=learning_rate)

    def run(self, samples: Sequence[Sample], signals: Sequence[Signal]) -> Update:
        """Train on the samples. Raises PolicyMismatch, and changes nothing, if they are not this policy's."""
        num_tokens = sum(len(sample.answer_ids) for sample in samples)
        self.optimiser.zero_grad(set_to_none=True)
        parts = []
        for begin, end in self._micro_batches(samples):
            part = self.distill(samples[begin:end], signals[begin:end])
            # Each part's loss is the mean over its own tokens; the step's is the mean over all.
            (part.loss * (part.token_loss_N.shape[0] / num_tokens)).backward()  # type: ignore[no-untyped-call]
            parts.append(part)
        logprob_N = torch.cat([part.chosen_logprob_N for part in parts])
        proof = prove(samples, logprob_N, self._policy_mismatch_threshold)
        self.optimiser.step()
        return Update(
            loss=torch.cat([part.token_loss_N for part in parts]).mean().item(),
            num_tokens=num_tokens,
            grad_norm=_norm(self.cartridge.master_L2GRD.grad),
            entropy=torch.cat([part.entropy_N for part in parts]).mean().item(),
            policy_mismatch_kl=proof.total.kl,
            policy_mismatch_max=proof.total.largest,
            mismatch_by_server=proof.by_server,
        )

    def distill(self, samples: Sequence[Sample], signals: Sequence[Signal]) -> Distilled:
        """Loss of samples in one packed forward, each seeing the cartridge and itself only."""
        return distill_samples(self._lm, self.cartridge.cast(), self._objective, samples, signals)

    def _micro_batches(self, samples: Sequence[Sample]) -> list[tuple[int, int]]:
        bounds, begin, num_tokens = [], 0, 0
        for index, sample in enumerate(samples):
            if index > begin and num_tokens + len(sample.ids) > self._micro_batch_tokens:
                bounds.append((begin, index))
                begin, num_tokens = index, 0
            num_tokens += len(sample.ids)
        return [*bounds, (begin, len(samples))]


def distill_samples(
    lm: FrozenLM, prefix_L2GPD: Tensor, objective: Objective, samples: Sequence[Sample], signals: Sequence[Signal]
) -> Distilled:
    """Distil samples behind one prefix KV [L, 2, G, P, D]; gradients reach the prefix."""
    sequences = [sample.ids[:-1] for sample in samples]
    hidden_TE = lm.packed_hidden(sequences, [prefix_L2GPD] * len(samples))
    rows, begin = [], 0
    for sample, sequence in zip(samples, sequences, strict=True):
        rows.append(hidden_TE[begin + sample.score_from - 1 : begin + len(sequence)])
        begin += len(sequence)
    token_ids_N = torch.tensor([token for sample in samples for token in sample.answer_ids], device=lm.device)
    return distill(objective, torch.cat(rows), _join(signals), lm.head_VE, token_ids_N)


def _join(signals: Sequence[Signal]) -> Signal:
    if isinstance(signals[0], TopK):
        tops = [signal for signal in signals if isinstance(signal, TopK)]
        return TopK(
            torch.cat([top.ids_NK for top in tops]),
            torch.cat([top.logprobs_NK for top in tops]),
            torch.cat([top.tail_logprob_N for top in tops]),
        )
    return torch.cat([signal for signal in signals if isinstance(signal, Tensor)])


def _norm(grad: Tensor | None) -> float:
    return math.nan if grad is None else grad.norm().item()
