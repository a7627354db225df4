"""The proof of answers that no policy wrote: that the model had the context before it, or that they are its words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from foundry.errors import PolicyMismatch
from foundry.model.lm import FrozenLM
from foundry.model.objectives import TopK, tile_rows
from foundry.selfstudy.wording import normalised
from services.trainer.sample import Sample
from services.trainer.update.gradient import Signal
from services.trainer.update.proof import Mismatch


@torch.no_grad()
def prove_authors(
    lm: FrozenLM, words: Mapping[str, str], samples: Sequence[Sample], signals: Sequence[Signal], threshold: float
) -> None:
    """`words` are those of each context's document (`foundry.selfstudy.wording`), `signals` the teacher's on answers.

    Raises PolicyMismatch if an answer's logprobs are not those of the model behind its context, by more than
    `threshold` nats a token over all answers of a context, or if words that came without are not the document's.
    """
    by_context: dict[str, list[Tensor]] = {}
    for sample, signal in zip(samples, signals, strict=True):
        if sample.rollout_logprobs:
            by_context.setdefault(sample.context, []).append(_log_ratio(lm, sample, signal))
        elif not _stands_in(words[sample.context], lm, sample):
            raise PolicyMismatch(
                f"nothing was trained: the answer of {sample.place} claims to be the document's own words, and they do "
                "not stand in it; delete the data set and start the run anew"
            )
    for context, log_ratios in by_context.items():
        mismatch = Mismatch.of(torch.cat(log_ratios))
        if not mismatch.within(threshold):
            raise PolicyMismatch(
                f"nothing was trained: written answers claim the model behind context {context}, whose logprobs are "
                f"others (policy_mismatch_kl {mismatch.kl:.3g} over {mismatch.num_tokens} tokens, threshold "
                f"{threshold:.3g}): who wrote them had another document or model before it than the teacher has"
            )


def _log_ratio(lm: FrozenLM, sample: Sample, signal: Signal) -> Tensor:
    """Of the answer's tokens [N], in float64: the teacher's logprobs less the claimed ones."""
    ids_N = torch.tensor(sample.answer_ids, device=lm.device)
    claimed_N = torch.tensor(sample.rollout_logprobs, device=lm.device).double()
    if isinstance(signal, TopK):
        return _bounded_log_ratio(signal, ids_N, claimed_N)
    rows = tile_rows(lm.head_VE)
    tiles = zip(torch.split(signal.to(lm.device), rows), torch.split(ids_N, rows), strict=True)
    chosen = [
        lm.logits(hidden_NE).log_softmax(-1).gather(-1, ids_N.unsqueeze(-1)).squeeze(-1) for hidden_NE, ids_N in tiles
    ]
    return torch.cat(chosen).double() - claimed_N


def _bounded_log_ratio(top: TopK, ids_N: Tensor, claimed_N: Tensor) -> Tensor:
    """Of a token that is not among the top k only so much is known: it can't be likelier than all the rest together."""
    hit_NK = top.ids_NK.to(ids_N.device) == ids_N.unsqueeze(-1)
    named_N = top.logprobs_NK.to(ids_N.device).double().masked_fill(~hit_NK, -torch.inf).amax(-1)
    bound_N = (top.tail_logprob_N.to(ids_N.device).double() - claimed_N).clamp(max=0.0)
    return torch.where(hit_NK.any(-1), named_N - claimed_N, bound_N)


def _stands_in(words: str, lm: FrozenLM, sample: Sample) -> bool:
    """The last word may be cut."""
    said = normalised(str(lm.tokenizer.decode(list(sample.answer_ids), skip_special_tokens=True)))
    return (said.rpartition(" ")[0] if sample.truncated else said) in words
