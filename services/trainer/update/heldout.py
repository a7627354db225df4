"""How far the cartridge is from the document on questions it never trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foundry.model.cartridge import TrainableCartridge
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Distilled, Objective
from foundry.model.packing import fitting_tokens, micro_batch_tokens, micro_batches
from services.trainer.sample import Sample
from services.trainer.update.gradient import Signal, distill_samples

# Whatever the run trains on, it is judged by the same exact divergence.
MEASURE = Objective("forward_kl")


@dataclass(frozen=True, slots=True)
class Distance:
    """Means over answer tokens, in nats: KL(teacher || student), and how unlikely the answers themselves are."""

    kl: float
    nll: float


class HeldOutSet:
    """Fixed answers and the teacher's distributions along them: the same tokens before and after training."""

    def __init__(self, samples: Sequence[Sample], micro_batch_tokens: int | None) -> None:
        self.samples = samples
        self._micro_batch_tokens = micro_batch_tokens
        # Filled once, from the teacher.
        self.signals: Sequence[Signal] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.answer_ids) for sample in self.samples)

    def distance(self, lm: FrozenLM, cartridge: TrainableCartridge) -> Distance:
        parts = list(self._distilled(lm, cartridge))
        kl_N = torch.cat([part.token_loss_N for part in parts])
        chosen_logprob_N = torch.cat([part.chosen_logprob_N for part in parts])
        return Distance(kl_N.mean().item(), -chosen_logprob_N.mean().item())

    def token_kl(self, lm: FrozenLM, cartridge: TrainableCartridge) -> Tensor:
        """KL(teacher || student) [N] of every answer token, sample after sample, in nats."""
        return torch.cat([part.token_loss_N for part in self._distilled(lm, cartridge)])

    @torch.no_grad()
    def _distilled(self, lm: FrozenLM, cartridge: TrainableCartridge) -> Iterator[Distilled]:
        for some in micro_batches(self.samples, self._micro_batch_tokens or micro_batch_tokens(lm, fitting_tokens(lm))):
            yield distill_samples(lm, cartridge.cast(), MEASURE, self.samples[some], self.signals[some])
