"""The gradient of a step's loss in the prefix: packed forwards and backwards over samples, a micro-batch at a time.

Runs with torch and transformers alone, on every rank. The loss is a mean over tokens: of all the step's, wherever they
are computed, so that the gradients of ranks only have to be added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foundry.model.cartridge import TrainableCartridge
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Distilled, Objective, TopK, distill
from foundry.model.packing import fitting_tokens, micro_batch_tokens, micro_batches, scored_hidden
from foundry.model.transfer import to_device
from services.trainer.sample import Sample
from services.trainer.update.importance import importance_weights

# Of a trained number, beside its master: gradient, two moments of Adam, and as much as two in passing.
_TRAINED_BYTES = 20

# Asks for no more than the logprobs of the tokens that stand there.
_LIKELIHOOD = Objective("nll")

# The teacher's word on one sample's answer: hidden states [N, E] or a TopK.
Signal = Tensor | TopK


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Of answer tokens, sample after sample: their losses, and the student's logprobs and entropies in nats."""

    loss_N: Tensor
    chosen_logprob_N: Tensor
    entropy_N: Tensor
    # Under the version that the samples claim.
    claimed_logprob_N: Tensor

    def stacked(self) -> Tensor:
        """[4, N], as the fields stand."""
        return torch.stack([self.loss_N, self.chosen_logprob_N, self.entropy_N, self.claimed_logprob_N])


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples with the teacher's signals, and all else that their gradient depends on."""

    samples: Sequence[Sample]
    signals: Sequence[Signal]
    objective: Objective
    # Answer tokens of the whole step, of which these samples may be a part.
    num_tokens: int
    # None: as many as fit into memory, up to where more gain nothing.
    micro_batch_tokens: int | None
    # KV [L, 2, G, P, D] of the version that the samples claim; None: the cartridge as it stands.
    claimed_L2GPD: Tensor | None = None


def backward(lm: FrozenLM, cartridge: TrainableCartridge, batch: Batch) -> TokenScores:
    """Add to the master's gradient what the samples have in that of the mean loss over `num_tokens` answer tokens."""
    parts = []
    beside_bytes = _TRAINED_BYTES * cartridge.master_L2GRD.numel()
    fitting = fitting_tokens(lm, beside_bytes)
    max_tokens = batch.micro_batch_tokens or micro_batch_tokens(lm, fitting)
    # Nothing in this loop waits for the device, so that it never waits for the host.
    for some in micro_batches(batch.samples, max_tokens):
        samples, signals = batch.samples[some], batch.signals[some]
        claimed_N = None
        if batch.claimed_L2GPD is not None:
            with torch.no_grad():
                claimed_N = distill_samples(lm, batch.claimed_L2GPD, _LIKELIHOOD, samples, signals).chosen_logprob_N
        # A long sample, or as many as somebody asked for.
        recompute = sum(len(sample.ids) for sample in samples) > fitting
        part = distill_samples(lm, cartridge.cast(), batch.objective, samples, signals, claimed_N, recompute=recompute)
        # Each part's loss is the mean over its own tokens; the step's is the mean over all.
        (part.loss * (part.token_loss_N.shape[0] / batch.num_tokens)).backward()  # type: ignore[no-untyped-call]
        claimed_N = part.chosen_logprob_N if claimed_N is None else claimed_N
        scores = TokenScores(part.token_loss_N, part.chosen_logprob_N, part.entropy_N, claimed_N)
        parts.append(scores.stacked())
    return TokenScores(*torch.cat(parts, dim=1))


def distill_samples(
    lm: FrozenLM,
    prefix_L2GPD: Tensor,
    objective: Objective,
    samples: Sequence[Sample],
    signals: Sequence[Signal],
    claimed_logprob_N: Tensor | None = None,
    *,
    recompute: bool = False,
) -> Distilled:
    """Distil samples behind one prefix KV [L, 2, G, P, D], in one packed forward; gradients reach the prefix.

    Each sample sees the prefix and itself only. With `claimed_logprob_N`, of the answers' tokens under another version
    that gave them, losses are weighted by how much likelier the prefix makes what stands before a token.
    """
    hidden_NE = torch.cat(scored_hidden(lm, samples, [prefix_L2GPD] * len(samples), recompute=recompute))
    token_ids = [token for sample in samples for token in sample.answer_ids]
    token_ids_N = to_device(torch.tensor(token_ids), lm.device)
    verbatim_N = None
    if objective.hard_label_weight:
        verbatim = [sample.verbatim for sample in samples for _ in sample.answer_ids]
        verbatim_N = to_device(torch.tensor(verbatim), lm.device)
    signal, weight_N = join(signals, lm.device), None
    if claimed_logprob_N is not None:
        # The weights of all tokens come before the gradient of any.
        chosen_N = distill(_LIKELIHOOD, hidden_NE.detach(), signal, lm.head_VE, token_ids_N).chosen_logprob_N
        lengths = [len(sample.answer_ids) for sample in samples]
        weight_N = importance_weights(chosen_N - claimed_logprob_N, lengths, objective.importance_ratio_max)
    return distill(objective, hidden_NE, signal, lm.head_VE, token_ids_N, verbatim_N, weight_N)


def join(signals: Sequence[Signal], device: torch.device) -> Signal:
    """One signal on `device`, of all samples."""
    if isinstance(signals[0], TopK):
        tops = [signal for signal in signals if isinstance(signal, TopK)]
        return TopK(
            to_device(torch.cat([top.ids_NK for top in tops]), device),
            to_device(torch.cat([top.logprobs_NK for top in tops]), device),
            to_device(torch.cat([top.tail_logprob_N for top in tops]), device),
        )
    return to_device(torch.cat([signal for signal in signals if isinstance(signal, Tensor)]), device)
