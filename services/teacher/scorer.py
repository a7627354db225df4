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
from foundry.model.objectives import tile_rows
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


class Scoring:
    """Scores of one micro-batch, which a GPU may still be computing."""

    def __init__(self, scores: list[ItemScores], device: torch.device) -> None:
        """Made behind the work that `scores` come from."""
        self._scores = scores
        self._done = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def result(self) -> list[ItemScores]:
        """In the order of the items, once they are in the host's memory. From any thread."""
        if self._done is not None:
            self._done.synchronize()
        return self._scores


@torch.no_grad()
def score(lm: FrozenLM, items: Sequence[Item], contexts: Sequence[Tensor], want: Want) -> Scoring:
    """Start to score one micro-batch, each item behind its own context's KV [L, 2, G, P, D].

    Contexts need not outlive the call: torch gives their memory to nobody who would come before this work.
    """
    return Scoring([_read_off(lm, rows_NE, want) for rows_NE in scored_hidden(lm, items, contexts)], lm.device)


def _read_off(lm: FrozenLM, hidden_NE: Tensor, want: Want) -> ItemScores:
    hidden = _to_host(hidden_NE) if want.hidden else None
    if not want.topk:
        return ItemScores(hidden_NE=hidden)
    ids, logprobs, tails = [], [], []
    for tile_NE in torch.split(hidden_NE, tile_rows(lm.head_VE)):
        logprobs_NV = lm.logits(tile_NE).log_softmax(-1)
        top = logprobs_NV.topk(want.topk, dim=-1)
        ids.append(top.indices.int())
        logprobs.append(top.values)
        # The tail summed over what remains: 1 - (sum of the top) would lose it to rounding.
        tails.append(logprobs_NV.scatter(-1, top.indices, -torch.inf).logsumexp(-1))
    return ItemScores(_to_host(torch.cat(ids)), _to_host(torch.cat(logprobs)), _to_host(torch.cat(tails)), hidden)


def _to_host(tensor: Tensor) -> Tensor:
    """From a GPU into pinned memory, behind all work that it has; nothing waits for it."""
    return tensor.to("cpu", non_blocking=True)
