"""A rank's share of a step: which samples it gets, and how they reach it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Self

import torch
from torch import Tensor

from foundry.identity import CartridgeHeader
from foundry.model.objectives import Objective, TopK
from services.trainer.ranks.group import RankMessage
from services.trainer.sample import Sample
from services.trainer.update.gradient import Batch, Signal, join


def share_out(num_tokens: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Which samples each rank gets, given their lengths, so that all have about as many tokens.

    The longest first, each to the rank with the fewest tokens so far: rank 0 gets one before others do.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for index in sorted(range(len(num_tokens)), key=lambda index: -num_tokens[index]):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += num_tokens[index]
    return [sorted(share) for share in shares]


@dataclass(frozen=True, slots=True)
class Share:
    # The prefix itself is broadcast, and after it the older one that the samples claim, if they do.
    prefix: CartridgeHeader
    batch: Batch
    claims_older: bool

    @classmethod
    def of(cls, prefix: CartridgeHeader, batch: Batch, indices: Sequence[int]) -> Self:
        """Of a step's batch, the samples that stand at `indices`."""
        samples = [batch.samples[index] for index in indices]
        signals = [batch.signals[index] for index in indices]
        return cls(prefix, replace(batch, samples=samples, signals=signals), batch.claimed_L2GPD is not None)

    def to_message(self) -> RankMessage:
        """Of the samples only what the gradient takes: where they come from is for the proof, on rank 0."""
        batch = self.batch
        values = {
            "prefix": asdict(self.prefix),
            "claims_older": self.claims_older,
            "objective": asdict(batch.objective),
            "num_tokens": batch.num_tokens,
            "micro_batch_tokens": batch.micro_batch_tokens,
        }
        tensors = {
            "ids": torch.tensor([token for sample in batch.samples for token in sample.ids], dtype=torch.int64),
            "turn_lengths": torch.tensor([len(sample.turn_ids) for sample in batch.samples], dtype=torch.int64),
            "answer_lengths": torch.tensor([len(sample.answer_ids) for sample in batch.samples], dtype=torch.int64),
            "verbatim": torch.tensor([sample.verbatim for sample in batch.samples], dtype=torch.int64),
        }
        if batch.signals:
            tensors |= _tensors(join(batch.signals, torch.device("cpu")))
        return RankMessage("share", values, tensors)

    @classmethod
    def from_message(cls, message: RankMessage) -> Self:
        values, tensors = message.values, message.tensors
        turn_lengths, answer_lengths = tensors["turn_lengths"].tolist(), tensors["answer_lengths"].tolist()
        samples, begin, ids, verbatim = [], 0, tensors["ids"].tolist(), tensors["verbatim"].tolist()
        for turn_length, answer_length, own_words in zip(turn_lengths, answer_lengths, verbatim, strict=True):
            turn_end = begin + turn_length
            end = turn_end + answer_length
            turn_ids, answer_ids = ids[begin:turn_end], ids[turn_end:end]
            samples.append(Sample(turn_ids, answer_ids, (), "", 0, truncated=False, verbatim=bool(own_words)))
            begin = end
        batch = Batch(
            samples,
            _signals(tensors, answer_lengths) if samples else [],
            Objective(**values["objective"]),
            values["num_tokens"],
            values["micro_batch_tokens"],
        )
        return cls(CartridgeHeader.from_dict(values["prefix"]), batch, values["claims_older"])


def _tensors(signal: Signal) -> dict[str, Tensor]:
    if isinstance(signal, TopK):
        return {"topk_ids": signal.ids_NK, "topk_logprobs": signal.logprobs_NK, "tail_logprob": signal.tail_logprob_N}
    return {"hidden": signal}


def _signals(tensors: Mapping[str, Tensor], lengths: list[int]) -> Sequence[Signal]:
    if "hidden" in tensors:
        return torch.split(tensors["hidden"], lengths)
    columns = (torch.split(tensors[name], lengths) for name in ("topk_ids", "topk_logprobs", "tail_logprob"))
    return [TopK(*rows) for rows in zip(*columns, strict=True)]
