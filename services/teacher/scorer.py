"""Scoring token ids behind a document: one micro-batch's forward, and what is read off it.

Runs with torch and transformers alone. Shape suffixes: N scored positions of one item, E hidden size, K top-k,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foundry.errors import InvalidArgument
from foundry.model.lm import FrozenLM
from foundry.model.objectives import TILE_ELEMENTS
from foundry.model.packing import scored_hidden


@dataclass(frozen=True, slots=True)
class Item:
    """Turn and answer `ids`, scored from position `score_from` on, behind the context named."""

    context_digest: str
    ids: Sequence[int]
    score_from: int


@dataclass(frozen=True, slots=True)
class Want:
    """What to report for every scored position."""

    topk: int = 0
    hidden: bool = False


@dataclass(frozen=True, slots=True)
class ItemScores:
    """One item's scores on the CPU; row i belongs to position score_from + i."""

    topk_ids_NK: Tensor | None = None
    topk_logprobs_NK: Tensor | None = None
    tail_logprob_N: Tensor | None = None
    hidden_NE: Tensor | None = None


def check_item(index: int, item: Item, vocab_size: int) -> None:
    """Raises InvalidArgument unless there is a position to score and a token before it."""
    ids, score_from = item.ids, item.score_from
    if not 1 <= score_from < len(ids):
        raise InvalidArgument(
            f"items[{index}].score_from is {score_from}: it must be at least 1 and below the {len(ids)} token ids",
            field=f"items[{index}].score_from",
        )
    if max(ids) >= vocab_size:
        raise InvalidArgument(
            f"items[{index}] has token id {max(ids)}, the vocabulary ends at {vocab_size - 1}",
            field=f"items[{index}].token_ids",
        )


@torch.no_grad()
def score(lm: FrozenLM, items: Sequence[Item], contexts: Sequence[Tensor], want: Want) -> list[ItemScores]:
    """Scores of one micro-batch in the order of its items, each behind its own context's KV [L, 2, G, P, D]."""
    return [_read_off(lm, rows_NE, want) for rows_NE in scored_hidden(lm, items, contexts)]


def _read_off(lm: FrozenLM, hidden_NE: Tensor, want: Want) -> ItemScores:
    hidden = hidden_NE.cpu() if want.hidden else None
    if not want.topk:
        return ItemScores(hidden_NE=hidden)
    ids, logprobs, tails = [], [], []
    for tile_NE in torch.split(hidden_NE, max(1, TILE_ELEMENTS // lm.spec.vocab_size)):
        logprobs_NV = lm.logits(tile_NE).log_softmax(-1)
        top = logprobs_NV.topk(want.topk, dim=-1)
        ids.append(top.indices.int())
        logprobs.append(top.values)
        # The tail summed over what remains: 1 - (sum of the top) would lose it to rounding.
        tails.append(logprobs_NV.scatter(-1, top.indices, -torch.inf).logsumexp(-1))
    return ItemScores(torch.cat(ids).cpu(), torch.cat(logprobs).cpu(), torch.cat(tails).cpu(), hidden)
