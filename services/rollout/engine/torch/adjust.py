"""Logits as a request wants them before a token is drawn: its grammar, biases, `min_tokens` and penalties.

In vLLM's order, and as vLLM means them. Rows of sequences that want none of it are not touched.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from services.rollout.engine import SamplingParams
from services.rollout.engine.answer import AnswerProgress


class Adjustment:
    """What one sequence adds to its logits, and the tokens so far that this depends on."""

    def __init__(self, sampling: SamplingParams, prompt_ids: SequenceOf[int], progress: AnswerProgress) -> None:
        self._sampling = sampling
        self._prompt_ids = prompt_ids
        self._grammar, self._end_ids = progress.grammar, sorted(progress.end_ids)
        self._answer_ids: list[int] = []

    def append(self, token_id: int) -> None:
        self._answer_ids.append(token_id)

    def apply(self, logits_V: Tensor) -> None:
        """In place."""
        if self._grammar is not None:
            logits_V.masked_fill_(~self._allowed(len(logits_V)).to(logits_V.device), -torch.inf)
        if self._sampling.logit_bias:
            ids, biases = zip(*self._sampling.logit_bias, strict=True)
            logits_V[list(ids)] += torch.tensor(biases, device=logits_V.device)
        if len(self._answer_ids) < self._sampling.min_tokens:
            logits_V[self._end_ids] = -torch.inf
        self._penalise(logits_V)

    def _allowed(self, vocab_size: int) -> Tensor:
        """Which tokens [V] the grammar takes."""
        assert self._grammar is not None
        assert self._sampling.grammar is not None
        allowed_V = torch.zeros(vocab_size, dtype=torch.bool)
        mask = self._grammar.mask()
        if mask is not None:
            bytes_n = torch.frombuffer(bytearray(mask), dtype=torch.uint8)
            bits_n = (bytes_n[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten().bool()[:vocab_size]
            allowed_V[: len(bits_n)] = bits_n
        if mask is None or not allowed_V.any():
            # Something must be drawn: an end, which the grammar then refuses.
            allowed_V[self._sampling.grammar.end_id] = True
        return allowed_V

    def _penalise(self, logits_V: Tensor) -> None:
        sampling = self._sampling
        device = logits_V.device
        answer_ids = torch.tensor(self._answer_ids, dtype=torch.long, device=device)
        if sampling.repetition_penalty != 1:
            prompt_ids = torch.tensor(self._prompt_ids, dtype=torch.long, device=device)
            seen = torch.unique(torch.cat([prompt_ids, answer_ids]))
            logits = logits_V[seen]
            penalty = sampling.repetition_penalty
            logits_V[seen] = torch.where(logits > 0, logits / penalty, logits * penalty)
        if sampling.frequency_penalty or sampling.presence_penalty:
            said, counts = torch.unique(answer_ids, return_counts=True)
            logits_V[said] -= sampling.frequency_penalty * counts + sampling.presence_penalty


def adjusted(logits_NV: Tensor, adjustments: SequenceOf[Adjustment | None]) -> Tensor:
    """The logits to draw from: the same tensor where nobody wants others."""
    if not any(adjustments):
        return logits_NV
    logits_NV = logits_NV.clone()
    for logits_V, adjustment in zip(logits_NV, adjustments, strict=True):
        if adjustment is not None:
            adjustment.apply(logits_V)
    return logits_NV
