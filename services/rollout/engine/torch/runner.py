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
from services.rollout.engine.torch.scoring import score_prompts
from services.rollout.engine.torch.sequence import Sequence


class Launched(Protocol):
    """A step that computes, or has computed."""

    @property
    def sequences(self) -> SequenceOf[Sequence]:
        """Those that get a token, in the order of the results."""
        ...

    @property
    def done(self) -> bool:
        """Whether results are there already."""
        ...

    def results(self) -> SequenceOf[Sampled]:
        """Waits for them."""
        ...


class Runner(Protocol):
    def launch(self, batch: SequenceOf[Scheduled]) -> Launched:
        """Steps are computed in order. A sequence's last token may still be unknown here."""
        ...


class Done:
    """A step with its results."""

    done = True

    def __init__(self, sequences: SequenceOf[Sequence], results: SequenceOf[Sampled]) -> None:
        self.sequences, self._results = sequences, results

    def results(self) -> SequenceOf[Sampled]:
        return self._results


class EagerRunner:
    """Operator after operator, on any device."""

    def __init__(self, lm: FrozenLM, kv: SlotKV) -> None:
        self._lm, self._kv = lm, kv

    def launch(self, batch: SequenceOf[Scheduled]) -> Launched:
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
        score_prompts(self._lm, hidden_TE, batch)
        if not ready:
            return Done([], [])
        uniforms = [sequence.draw() for sequence in ready]
        return Done(ready, sample(self._lm.logits(hidden_TE[rows]), ready, uniforms))
