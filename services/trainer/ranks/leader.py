"""Rank 0's side of a gradient that several GPUs compute: everything else of a run is its own.

The others (`services.trainer.ranks.follower`) keep nothing from step to step. They get the prefix as it was published
and their samples; back come losses, logprobs and entropies, so that rank 0 proves all samples, and the sum of
gradients. The shares follow from the samples alone. On the CPU the same ranks thus come to the same bits again; on a
GPU not even one rank does, whose sums have no fixed order.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import torch

from foundry.errors import BY_REASON, FoundryError
from foundry.model.cartridge import TrainableCartridge
from foundry.model.lm import FrozenLM
from services.trainer.ranks.group import Group, RankMessage
from services.trainer.ranks.share import Share, share_out
from services.trainer.sample import Sample
from services.trainer.update.gradient import Batch, TokenScores, backward

# How often followers that have nothing to do hear that rank 0 is alive, and it whether they are.
BEAT_SECONDS = 2.0


class Leader:
    def __init__(self, group: Group) -> None:
        self._group = group
        self._followers = range(1, group.num_ranks)
        # One exchange at a time: a beat never comes between a share and its scores.
        self._speaking = threading.Lock()

    def backward(self, lm: FrozenLM, cartridge: TrainableCartridge, batch: Batch) -> TokenScores:
        """As `services.trainer.update.gradient.backward`, by all ranks.

        Raises RankLost if one is gone, and what a follower raised: the gradient is then incomplete.
        """
        assigned = share_out([len(sample.ids) for sample in batch.samples], self._group.num_ranks)
        shares = [Share.of(cartridge.header, batch, indices) for indices in assigned]
        with self._speaking:
            for rank in self._followers:
                self._group.send(rank, shares[rank].to_message())
            self._group.broadcast(cartridge.cast().detach())
            if batch.claimed_L2GPD is not None:
                self._group.broadcast(batch.claimed_L2GPD)
            try:
                own = backward(lm, cartridge, shares[0].batch)
            finally:
                # They will be sent in any case, and must not be taken for those of another step.
                replies = {rank: self._group.receive(rank) for rank in self._followers}
            scores = [own, *(_scores(rank, reply, lm.device) for rank, reply in replies.items())]
            self._tell(RankMessage("sum"))
            grad = cartridge.master_L2GRD.grad
            assert grad is not None
            self._group.sum(grad)
        return _in_order(scores, assigned, batch.samples)

    async def beat(self) -> None:
        """Tell followers that have nothing to do that they may go on waiting, for ever. Raises RankLost."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            await asyncio.to_thread(self._beat)

    def end(self, status: int) -> None:
        """Have the followers exit with `status`. Raises RankLost."""
        with self._speaking:
            self._tell(RankMessage("end", {"status": status}))
        self._group.close()

    def _beat(self) -> None:
        if self._speaking.acquire(blocking=False):
            try:
                self._tell(RankMessage("beat"))
            finally:
                self._speaking.release()

    def _tell(self, message: RankMessage) -> None:
        for rank in self._followers:
            self._group.send(rank, message)


def _scores(rank: int, reply: RankMessage, device: torch.device) -> TokenScores:
    if reply.kind == "failed":
        error = BY_REASON.get(reply.values["reason"], FoundryError)
        raise error(f"rank {rank}: {reply.values['message']}")
    return TokenScores(*reply.tensors["scores"].to(device))


def _in_order(
    scores: Sequence[TokenScores], assigned: Sequence[Sequence[int]], samples: Sequence[Sample]
) -> TokenScores:
    """Of all samples as they stand in the step, from those of each rank."""
    rows: dict[int, torch.Tensor] = {}
    for part, indices in zip(scores, assigned, strict=True):
        lengths = [len(samples[index].answer_ids) for index in indices]
        rows |= dict(zip(indices, torch.split(part.stacked(), lengths, dim=1), strict=True))
    return TokenScores(*torch.cat([rows[index] for index in range(len(samples))], dim=1))
