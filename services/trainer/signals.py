"""The teacher's word on samples: asked for as the objective wants it, of each sample's own context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from foundry.model.objectives import Objective, TopK
from foundry.rpc import tensors
from foundry.rpc.teacher import TeacherClient
from foundry.v1 import teacher_pb2
from services.trainer.sample import Sample
from services.trainer.update.gradient import Signal


class Teachers:
    """The contexts that samples of a run have, each with its client."""

    def __init__(self, by_context: Mapping[str, TeacherClient]) -> None:
        self._by_context = by_context

    async def signals(self, samples: Sequence[Sample], objective: Objective) -> list[Signal]:
        """In the order of the samples. Raises what `TeacherClient.score` raises."""
        found: dict[int, Signal] = {}
        for context, teacher in self._by_context.items():
            places = [place for place, sample in enumerate(samples) if sample.context == context]
            if places:
                signals = await signals_of(teacher, [samples[place] for place in places], objective)
                found |= dict(zip(places, signals, strict=True))
        return [found[place] for place in range(len(samples))]

    async def close(self) -> None:
        for teacher in self._by_context.values():
            await teacher.close()


async def signals_of(teacher: TeacherClient, samples: Sequence[Sample], objective: Objective) -> list[Signal]:
    """Of samples that all have the teacher's context, in their order."""
    want = teacher_pb2.Want(hidden=True) if objective.needs_hidden else teacher_pb2.Want(topk=objective.k)
    return [_signal(parts, objective) async for parts in teacher.score(samples, want)]


def _signal(parts: Sequence[teacher_pb2.ScoreResponse], objective: Objective) -> Signal:
    if objective.needs_hidden:
        return torch.cat([tensors.from_message(part.hidden) for part in parts])
    return TopK(
        torch.cat([tensors.from_message(part.topk_ids) for part in parts]).long(),
        torch.cat([tensors.from_message(part.topk_logprobs) for part in parts]),
        torch.cat([tensors.from_message(part.tail_logprob) for part in parts]),
    )
