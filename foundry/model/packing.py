"""Turns with their answers in packed forwards: how teacher and trainer get at what predicts each answer's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Protocol

from torch import Tensor

from foundry.model.lm import FrozenLM


class Scored(Protocol):
    """Token ids of a turn and its answer; the positions from `score_from` on, at least 1, are the answer's."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def score_from(self) -> int: ...


def micro_batches(samples: Sequence[Scored], max_tokens: int) -> Iterator[slice]:
    """Consecutive samples of at most `max_tokens` in all; one longer than that stands alone."""
    begin, num_tokens = 0, 0
    for index, sample in enumerate(samples):
        if index > begin and num_tokens + len(sample.ids) > max_tokens:
            yield slice(begin, index)
            begin, num_tokens = index, 0
        num_tokens += len(sample.ids)
    if samples:
        yield slice(begin, len(samples))


def scored_hidden(lm: FrozenLM, samples: Sequence[Scored], prefixes: Sequence[Tensor | None]) -> list[Tensor]:
    """The hidden states [N, E] that predict each sample's N answer tokens, out of one packed forward.

    Each sample sees its own prefix KV [L, 2, G, P, D] and itself only; gradients reach the prefixes.
    """
    # The last token of an answer predicts nothing that is scored.
    sequences = [sample.ids[:-1] for sample in samples]
    hidden_TE = lm.packed_hidden(sequences, prefixes)
    ends = list(accumulate(map(len, sequences)))
    return [
        hidden_TE[end - len(sequence) + sample.score_from - 1 : end]
        for sample, sequence, end in zip(samples, sequences, ends, strict=True)
    ]
