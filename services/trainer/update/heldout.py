"""How far the cartridge is from the document on questions it never trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foundry.model.cartridge import TrainableCartridge
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective
from foundry.model.packing import micro_batches
from services.trainer.sample import Sample
from services.trainer.update.gradient import Signal, distill_samples

# Whatever the run trains on, it is judged by the same exact divergence.
MEASURE = Objective("forward_kl")


class HeldOutSet:
    """Fixed answers and the teacher's distributions along them: the same tokens before and after training."""

    def __init__(self, samples: Sequence[Sample], micro_batch_tokens: int) -> None:
        self.samples = samples
        self._micro_batch_tokens = micro_batch_tokens
        # Filled once, from the teacher.
        self.signals: Sequence[Signal] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.answer_ids) for sample in self.samples)

    def kl(self, lm: FrozenLM, cartridge: TrainableCartridge) -> float:
        """Mean KL(teacher || student) per answer token, in nats."""
        return self.token_kl(lm, cartridge).mean().item()

    @torch.no_grad()
    def token_kl(self, lm: FrozenLM, cartridge: TrainableCartridge) -> Tensor:
        """KL(teacher || student) [N] of every answer token, sample after sample, in nats."""
        token_kl_N = [
            distill_samples(lm, cartridge.cast(), MEASURE, self.samples[some], self.signals[some]).token_loss_N
            for some in micro_batches(self.samples, self._micro_batch_tokens)
        ]
        return torch.cat(token_kl_N)
