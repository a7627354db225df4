"""Logprobs of prompts' own tokens, out of the hidden states that a step has computed anyway.

Shape suffixes as in `foundry.model.lm`, and n of a prompt's tokens, K alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from foundry.model.lm import FrozenLM
from services.rollout.engine import PromptLogprobs
from services.rollout.engine.torch.scheduler import Scheduled

# Of logits at once: 64 MiB in float32, and as much again for what is computed of them.
_MAX_LOGITS = 16 * 1024**2


def has_unscored(batch: SequenceOf[Scheduled]) -> bool:
    """Whether the batch computes tokens whose successors' logprobs are wanted."""
    return any(_targets(each) for each in batch)


def score_prompts(lm: FrozenLM, hidden_TE: Tensor, batch: SequenceOf[Scheduled]) -> None:
    """Adds to each sequence that wants it what the hidden states of this batch say of its prompt."""
    row = 0
    for each in batch:
        sequence, num_tokens = each
        if targets := _targets(each):
            num_rows = max(1, _MAX_LOGITS // lm.spec.vocab_size)
            for begin in range(0, len(targets), num_rows):
                ids = targets[begin : begin + num_rows]
                logits_nV = lm.logits(hidden_TE[row + begin : row + begin + len(ids)])
                sequence.scored.append(score(logits_nV, ids, sequence.sampling.num_prompt_logprobs or 0))
        row += num_tokens


def score(logits_nV: Tensor, ids: SequenceOf[int], num_alternatives: int) -> PromptLogprobs:
    """Of the tokens that follow where the logits stand."""
    ids_n1 = torch.tensor(ids, device=logits_nV.device)[:, None]
    lse_n1 = logits_nV.logsumexp(dim=-1, keepdim=True)
    logits_n1 = logits_nV.gather(1, ids_n1)
    top_nK = torch.topk(logits_nV, num_alternatives, dim=-1)
    return PromptLogprobs(
        logprobs_n=(logits_n1 - lse_n1)[:, 0].cpu(),
        ranks_n=(logits_nV > logits_n1).sum(dim=-1).add(1).cpu(),
        top_ids_nK=top_nK.indices.cpu(),
        top_logprobs_nK=(top_nK.values - lse_n1).cpu(),
    )


def joined(parts: SequenceOf[PromptLogprobs], num_alternatives: int) -> PromptLogprobs:
    """The parts of a prompt as one; of a prompt of a single token there are none."""
    if not parts:
        nothing_nK = torch.empty(0, num_alternatives)
        return PromptLogprobs(torch.empty(0), torch.empty(0), nothing_nK, nothing_nK)
    return PromptLogprobs(
        torch.cat([each.logprobs_n for each in parts]),
        torch.cat([each.ranks_n for each in parts]),
        torch.cat([each.top_ids_nK for each in parts]),
        torch.cat([each.top_logprobs_nK for each in parts]),
    )


def _targets(each: Scheduled) -> SequenceOf[int]:
    """The prompt's tokens after each of those that are computed."""
    sequence, num_tokens = each
    if sequence.sampling.num_prompt_logprobs is None:
        return ()
    begin = sequence.num_computed_tokens + 1
    return sequence.prompt_ids[begin : begin + num_tokens]
