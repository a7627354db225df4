"""Turns with their answers in packed forwards: how teacher and trainer get at what predicts each answer's tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from foundry.model.lm import FrozenLM

# Beyond so many a GPU is full, and more take memory only: four samples of 1152 tokens.
CUDA_MICRO_BATCH_TOKENS = 4608
_CPU_MICRO_BATCH_TOKENS = 4096
# Of what is free: the rest is for tiles of logits, gradients of one layer and what the allocator can't use.
_USABLE_MEMORY = 0.8


class Scored(Protocol):
    """Token ids of a turn and its answer; the positions from `score_from` on, at least 1, are the answer's."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def score_from(self) -> int: ...


def micro_batch_tokens(lm: FrozenLM, fitting_tokens: int) -> int:
    """Tokens in one forward, of which so many may fit: beyond these a device gains nothing."""
    return min(fitting_tokens, CUDA_MICRO_BATCH_TOKENS if lm.device.type == "cuda" else _CPU_MICRO_BATCH_TOKENS)


def fitting_tokens(lm: FrozenLM, beside_bytes: int = 0) -> int:
    """Most tokens in one forward whose backward fits into the memory that is free, if `beside_bytes` are taken too.

    On CUDA each token keeps `kept_bytes_per_token`; of what is free a fifth is left. Elsewhere nothing is counted.
    """
    if lm.device.type != "cuda":
        return sys.maxsize
    free_bytes, _ = torch.cuda.mem_get_info(lm.device)
    # What torch holds for itself and nothing lives in is free too.
    free_bytes += torch.cuda.memory_reserved(lm.device) - torch.cuda.memory_allocated(lm.device)
    return max(1, int(_USABLE_MEMORY * free_bytes - beside_bytes) // kept_bytes_per_token(lm))


def kept_bytes_per_token(lm: FrozenLM) -> int:
    """What compiled layers keep of a token for the backward: in each the inputs of both norms [E], queries and
    attention's output [H, D], keys and values [G, D], and of the MLP both inputs of its product [I]. No linear layer
    keeps its input: that is for gradients of weights, which are frozen.
    """
    config = lm.model.config.get_text_config()
    spec = lm.spec
    heads = config.num_attention_heads + spec.num_kv_heads
    numbers = 2 * (spec.hidden_size + heads * spec.head_dim + config.intermediate_size)
    return int(spec.num_layers * numbers * lm.dtype.itemsize)


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


def scored_hidden(
    lm: FrozenLM, samples: Sequence[Scored], prefixes: Sequence[Tensor | None], *, recompute: bool = False
) -> list[Tensor]:
    """The hidden states [N, E] that predict each sample's N answer tokens, out of one packed forward.

    Each sample sees its own prefix KV [L, 2, G, P, D] and itself only; gradients reach the prefixes. `recompute`:
    see `FrozenLM.packed_hidden`.
    """
    # The last token of an answer predicts nothing that is scored.
    sequences = [sample.ids[:-1] for sample in samples]
    hidden_TE = lm.packed_hidden(sequences, prefixes, recompute=recompute)
    ends = list(accumulate(map(len, sequences)))
    return [
        hidden_TE[end - len(sequence) + sample.score_from - 1 : end]
        for sample, sequence, end in zip(samples, sequences, ends, strict=True)
    ]
