"""What computes a scheduled batch: its tokens' KV, and the next token of each sequence that has no more pending."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Protocol

import torch

from foundry.model.lm import FrozenLM
from services.rollout.engine.torch.attention import StepAttention
from services.rollout.engine.torch.kv import SlotKV
from services.rollout.engine.torch.sampler import Sampled, sample
from services.rollout.engine.torch.scheduler import Scheduled
from services.rollout.engine.torch.sequence import Sequence


class Runner(Protocol):
    def run(self, batch: SequenceOf[Scheduled]) -> list[tuple[Sequence, Sampled]]: ...


class EagerRunner:
    """Operator after operator, on any device."""

    def __init__(self, lm: FrozenLM, kv: SlotKV) -> None:
        self._lm, self._kv = lm, kv

    def run(self, batch: SequenceOf[Scheduled]) -> list[tuple[Sequence, Sampled]]:
        ids: list[int] = []
        ready, rows = [], []
        for sequence, num_tokens in batch:
            begin = sequence.num_computed_tokens
            ids += sequence.token_ids[begin : begin + num_tokens]
            if sequence.num_pending_tokens == num_tokens:
                ready.append(sequence)
                rows.append(len(ids) - 1)
        plan = StepAttention(self._kv, batch, self._lm.num_heads)
        hidden_TE = self._lm.hidden(torch.tensor(ids, device=self._lm.device), plan.positions_T, plan)
        if not ready:
            return []
        uniforms = [sequence.draw() for sequence in ready]
        return list(zip(ready, sample(self._lm.logits(hidden_TE[rows]), ready, uniforms), strict=True))
