"""Scoring token ids behind a document: one micro-batch's forward, and what is read off it.

Runs with torch and transformers alone. Shape suffixes: N scored positions of one item, E hidden size, K top-k,
C candidates, V vocabulary.
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

    chosen: bool = False
    topk: int = 0
    candidates: Sequence[int] = ()
    hidden: bool = False

    @property
    def logits(self) -> bool:
        return self.chosen or self.topk > 0 or len(self.candidates) > 0


@dataclass(frozen=True, slots=True)
class Scores:
    """One item's scores on the CPU; row i belongs to position score_from + i."""

    chosen_N: Tensor | None = None
    topk_ids_NK: Tensor | None = None
    topk_logprobs_NK: Tensor | None = None
    tail_logprob_N: Tensor | None = None
    candidates_NC: Tensor | None = None
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
def score(lm: FrozenLM, items: Sequence[Item], contexts: Sequence[Tensor], want: Want) -> list[Scores]:
    """Scores of one micro-batch in the order of its items, each behind its own context's KV [L, 2, G, P, D]."""
    hidden = scored_hidden(lm, items, contexts)
    return [
        _read_off(lm, rows_NE, item.ids[item.score_from :], want) for item, rows_NE in zip(items, hidden, strict=True)
    ]


def _read_off(lm: FrozenLM, hidden_NE: Tensor, ids: Sequence[int], want: Want) -> Scores:
    hidden = hidden_NE.cpu() if want.hidden else None
    if not want.logits:
        return Scores(hidden_NE=hidden)
    ids_N = torch.tensor(ids, device=lm.device)
    candidates_C = torch.tensor(list(want.candidates), device=lm.device, dtype=torch.long)
    chosen, topk_ids, topk_logprobs, tails, candidates = [], [], [], [], []
    rows = max(1, TILE_ELEMENTS // lm.spec.vocab_size)
    for start in range(0, len(ids), rows):
        tile = slice(start, start + rows)
        logprobs_NV = lm.logits(hidden_NE[tile]).log_softmax(-1)
        if want.chosen:
            chosen.append(logprobs_NV.gather(-1, ids_N[tile, None]).squeeze(-1))
        if want.topk:
            top = logprobs_NV.topk(want.topk, dim=-1)
            topk_ids.append(top.indices.int())
            topk_logprobs.append(top.values)
            # The tail summed over what remains: 1 - (sum of the top) would lose it to rounding.
            tails.append(logprobs_NV.scatter(-1, top.indices, -torch.inf).logsumexp(-1))
        if want.candidates:
            candidates.append(logprobs_NV[:, candidates_C])
    return Scores(
        chosen_N=_join(chosen),
        topk_ids_NK=_join(topk_ids),
        topk_logprobs_NK=_join(topk_logprobs),
        tail_logprob_N=_join(tails),
        candidates_NC=_join(candidates),
        hidden_NE=hidden,
    )


def _join(tiles: list[Tensor]) -> Tensor | None:
    return torch.cat(tiles).cpu() if tiles else None
