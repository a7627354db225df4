"""The trainer's side of the teacher service: signals, and the check that they belong to the ids that were sent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import torch

from foundry.errors import AlignmentError, ContextNotFound, IdentityMismatch
from foundry.identity import content_digest, ids_checksum
from foundry.model.objectives import Objective, TopK
from foundry.rpc import tensors
from foundry.rpc.channel import decoded
from foundry.rpc.pods import Pod, Pods, rendezvous
from foundry.v1 import common_pb2, teacher_pb2, teacher_pb2_grpc
from services.trainer.sample import Sample
from services.trainer.update.gradient import Signal

_TENSOR = common_pb2.Tensor.DESCRIPTOR


class Teacher:
    """One document's context on a teacher server, the one among several that is the document's."""

    def __init__(
        self,
        pods: Pods,
        model_fingerprint: str,
        template_digest: str,
        document: str,
        context_digest: str,
        timeout_seconds: float,
    ) -> None:
        """`context_digest` is of the ids that the document must become. `pods` are closed with it."""
        self._pods = pods
        self._pod: Pod | None = None
        # The document's and not the context's, which the gateway doesn't know: both must come to the same teacher.
        self._key = content_digest(document.encode())
        self._model_fingerprint = model_fingerprint
        self._template_digest = template_digest
        self._document = document
        self._timeout_seconds = timeout_seconds
        self._context_digest = context_digest

    async def put_context(self) -> None:
        """Have the document's KV computed, or found.

        Raises what the teacher raised, e.g. DocumentTooLong, IdentityMismatch if its template is another, and
        AlignmentError if it read another document.
        """
        await self._put_context(await self._choose())

    async def score(self, samples: Sequence[Sample], objective: Objective) -> list[Signal]:
        """The teacher's word on every answer token of every sample, in order.

        Raises AlignmentError if a score belongs to other ids, another context or another model.
        """
        pod = await self._choose()
        try:
            return await self._score(pod, samples, objective)
        except ContextNotFound:
            # Dropped for other documents' sake, or another teacher than before: the same digest comes of the same ids.
            await self._put_context(pod)
            return await self._score(pod, samples, objective)

    async def close(self) -> None:
        await self._pods.close()

    async def _choose(self) -> Pod:
        """The teacher that has the context, as long as it can be reached: a better place would compute it again."""
        pods = await self._pods.reachable()
        if self._pod not in pods:
            self._pod = max(pods, key=lambda pod: rendezvous(self._key, pod.address))
        return self._pod

    async def _put_context(self, pod: Pod) -> None:
        with pod.calling() as channel:
            stub: teacher_pb2_grpc.TeacherAsyncStub = teacher_pb2_grpc.TeacherStub(channel)
            message = await stub.PutContext(
                teacher_pb2.PutContextRequest(model_fingerprint=self._model_fingerprint, document=self._document),
                timeout=self._timeout_seconds,
            )
        found = decoded(message, pod.name)
        if found.identity.template_digest != self._template_digest:
            raise IdentityMismatch(
                f"{pod.name} has template {found.identity.template_digest}, this trainer {self._template_digest}: "
                "give all services the same template_clock"
            )
        if found.context_digest != self._context_digest:
            raise AlignmentError(
                f"{pod.name} read the document as {found.context_digest}, it is {self._context_digest}"
            )

    async def _score(self, pod: Pod, samples: Sequence[Sample], objective: Objective) -> list[Signal]:
        want = teacher_pb2.Want(hidden=True) if objective.needs_hidden else teacher_pb2.Want(topk=objective.k)
        request = teacher_pb2.ScoreRequest(
            model_fingerprint=self._model_fingerprint,
            template_digest=self._template_digest,
            items=[
                teacher_pb2.ScoreItem(
                    context_digest=self._context_digest,
                    token_ids=common_pb2.TokenIds(ids=sample.ids),
                    score_from=sample.score_from,
                )
                for sample in samples
            ],
            want=want,
        )
        parts: list[list[teacher_pb2.ScoreResponse]] = [[] for _ in samples]
        with pod.calling() as channel:
            stub: teacher_pb2_grpc.TeacherAsyncStub = teacher_pb2_grpc.TeacherStub(channel)
            async for message in stub.Score(_once(request), timeout=self._timeout_seconds):
                response = decoded(message, pod.name)
                if response.item >= len(samples):
                    raise AlignmentError(f"{pod.name} scored item {response.item} of {len(samples)}")
                parts[response.item].append(response)
        for index, sample in enumerate(samples):
            self._check(index, sample, parts[index])
        return [_signal(sample_parts, objective) for sample_parts in parts]

    def _check(self, index: int, sample: Sample, parts: Sequence[teacher_pb2.ScoreResponse]) -> None:
        position = sample.score_from
        for part in parts:
            identity = (part.context_digest, part.identity.model_fingerprint, part.identity.template_digest)
            if identity != (self._context_digest, self._model_fingerprint, self._template_digest):
                raise AlignmentError(f"item {index} was scored with {identity}")
            if part.begin != position or part.ids_checksum != ids_checksum(sample.ids, part.begin, part.end):
                raise AlignmentError(
                    f"item {index}: scores of positions {part.begin} to {part.end} do not belong to the ids sent"
                )
            scores = [tensor for field, tensor in part.ListFields() if field.message_type == _TENSOR]
            if part.tensors_checksum != tensors.checksum(scores):
                raise AlignmentError(f"item {index}: scores from position {part.begin} were damaged on the way")
            rows = {tensor.shape[0] for tensor in scores}
            if rows != {part.end - part.begin}:
                raise AlignmentError(
                    f"item {index}: {rows} rows came for the {part.end - part.begin} positions from {part.begin}"
                )
            position = part.end
        if position != len(sample.ids):
            raise AlignmentError(f"item {index}: scores end at position {position} of {len(sample.ids)}")


def _signal(parts: Sequence[teacher_pb2.ScoreResponse], objective: Objective) -> Signal:
    if objective.needs_hidden:
        return torch.cat([tensors.from_message(part.hidden) for part in parts])
    return TopK(
        torch.cat([tensors.from_message(part.topk_ids) for part in parts]).long(),
        torch.cat([tensors.from_message(part.topk_logprobs) for part in parts]),
        torch.cat([tensors.from_message(part.tail_logprob) for part in parts]),
    )


async def _once(request: teacher_pb2.ScoreRequest) -> AsyncIterator[teacher_pb2.ScoreRequest]:
    yield request
