"""The client of the teacher service: scores, and the check that they belong to the ids that were sent.

Nothing here needs torch: tensors stay messages, so that the gateway can ask too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING

from foundry.errors import AlignmentError, ContextNotFound, DocumentTooLong, IdentityMismatch
from foundry.identity import content_digest, ids_checksum, tensors_checksum
from foundry.rpc.channel import decoded
from foundry.rpc.limits import MAX_CONTENT_BYTES, batches
from foundry.rpc.pods import Pod, Pods, rendezvous
from foundry.v1 import common_pb2, teacher_pb2, teacher_pb2_grpc

if TYPE_CHECKING:
    from foundry.model.packing import Scored

_TENSOR = common_pb2.Tensor.DESCRIPTOR


class TeacherClient:
    """One document's context on a teacher server, the one among several that is the document's."""

    def __init__(
        self,
        pods: Pods,
        model_fingerprint: str,
        document: str | None,
        *,
        timeout_seconds: float,
        caller: common_pb2.Caller | None = None,
        template_digest: str = "",
        context_digest: str = "",
    ) -> None:
        """`document` None is the model without one. `context_digest` is of the ids that it must become, with the
        template of `template_digest`: who scores needs both. `close` closes the pods."""
        self._pods = pods
        self._pod: Pod | None = None
        # The document's and not the context's, which the gateway doesn't know: both must come to the same teacher.
        self._key = content_digest((document or "").encode())
        self._model_fingerprint = model_fingerprint
        self._template_digest = template_digest
        self._document = document
        self._timeout_seconds = timeout_seconds
        self._caller = caller
        self._context_digest = context_digest

    async def put_context(self) -> int:
        """Have the document's KV computed, or found. Tokens of the document with its template.

        Raises what the teacher raised, DocumentTooLong also where no message holds the document, IdentityMismatch if
        the teacher's template is another, and AlignmentError if it read another document.
        """
        if (num_bytes := len((self._document or "").encode())) > MAX_CONTENT_BYTES:
            raise DocumentTooLong(
                f"the document has {num_bytes} bytes, a teacher takes at most {MAX_CONTENT_BYTES}", field="document"
            )
        return await self._put_context(await self._choose())

    async def score(
        self, samples: Sequence[Scored], want: teacher_pb2.Want
    ) -> AsyncIterator[list[teacher_pb2.ScoreResponse]]:
        """The teacher's word on every answer token of every sample, in order: each sample's parts, as soon as they are
        here.

        Raises AlignmentError if a score belongs to other ids, another context or another model.
        """
        pod = await self._choose()
        items = [
            teacher_pb2.ScoreItem(
                context_digest=self._context_digest,
                token_ids=common_pb2.TokenIds(ids=sample.ids),
                score_from=sample.score_from,
            )
            for sample in samples
        ]
        for some in batches(items):
            num_scored, put_at = 0, -1
            while num_scored < len(some):
                try:
                    async for parts in self._score(pod, some[num_scored:], want):
                        num_scored += 1
                        yield parts
                except ContextNotFound:
                    if num_scored == put_at:
                        # It was put for nothing: a teacher that keeps it no longer than that never will be through.
                        raise
                    put_at = num_scored
                    # Dropped for other documents' sake, or another teacher than before: the same digest comes of the
                    # same ids.
                    await self._put_context(pod)

    async def close(self) -> None:
        await self._pods.close()

    async def _choose(self) -> Pod:
        """The teacher that has the context, as long as it can be reached: a better place would compute it again."""
        pods = await self._pods.reachable()
        if self._pod not in pods:
            self._pod = max(pods, key=lambda pod: rendezvous(self._key, pod.address))
        return self._pod

    async def _put_context(self, pod: Pod) -> int:
        with pod.calling() as channel:
            stub: teacher_pb2_grpc.TeacherAsyncStub = teacher_pb2_grpc.TeacherStub(channel)
            message = await stub.PutContext(
                teacher_pb2.PutContextRequest(
                    model_fingerprint=self._model_fingerprint,
                    document=self._document or "",
                    without_document=self._document is None,
                    caller=self._caller,
                ),
                timeout=self._timeout_seconds,
            )
        found = decoded(message, pod.name)
        if self._template_digest and found.identity.template_digest != self._template_digest:
            raise IdentityMismatch(
                f"{pod.name} has template {found.identity.template_digest}, here it is {self._template_digest}: "
                "give all services the same template_clock"
            )
        if self._context_digest and found.context_digest != self._context_digest:
            raise AlignmentError(
                f"{pod.name} read the document as {found.context_digest}, it is {self._context_digest}"
            )
        return found.num_tokens

    async def _score(
        self, pod: Pod, items: Sequence[teacher_pb2.ScoreItem], want: teacher_pb2.Want
    ) -> AsyncIterator[list[teacher_pb2.ScoreResponse]]:
        request = teacher_pb2.ScoreRequest(
            model_fingerprint=self._model_fingerprint,
            template_digest=self._template_digest,
            items=items,
            want=want,
            caller=self._caller,
        )
        num_scored, parts = 0, list[teacher_pb2.ScoreResponse]()
        with pod.calling() as channel:
            stub: teacher_pb2_grpc.TeacherAsyncStub = teacher_pb2_grpc.TeacherStub(channel)
            async for message in stub.Score(request, timeout=self._timeout_seconds):
                part = decoded(message, pod.name)
                if part.item != num_scored or num_scored == len(items):
                    raise AlignmentError(
                        f"{pod.name} scored item {part.item} where {num_scored} of {len(items)} was due"
                    )
                item = items[num_scored]
                self._check(item, part, parts[-1].end if parts else item.score_from, pod.name)
                parts.append(part)
                if part.end == len(item.token_ids.ids):
                    yield parts
                    num_scored, parts = num_scored + 1, []
        if num_scored < len(items):
            raise AlignmentError(f"{pod.name} sent whole scores of {num_scored} items of {len(items)}")

    def _check(self, item: teacher_pb2.ScoreItem, part: teacher_pb2.ScoreResponse, position: int, peer: str) -> None:
        """Raises AlignmentError unless the part is the item's, from `position` on."""
        ids = item.token_ids.ids
        identity = (part.context_digest, part.identity.model_fingerprint, part.identity.template_digest)
        if identity != (self._context_digest, self._model_fingerprint, self._template_digest):
            raise AlignmentError(f"{peer} scored with {identity}")
        if part.begin != position or part.ids_checksum != ids_checksum(ids, part.begin, part.end):
            raise AlignmentError(
                f"{peer} sent scores of positions {part.begin} to {part.end} that do not belong to the ids sent"
            )
        tensors = [tensor for field, tensor in part.ListFields() if field.message_type == _TENSOR]
        if part.tensors_checksum != scores_checksum(tensors):
            raise AlignmentError(f"{peer} sent scores from position {part.begin} that were damaged on the way")
        rows = {tensor.shape[0] for tensor in tensors}
        if rows != {part.end - part.begin}:
            raise AlignmentError(f"{peer} sent {rows} rows for the {part.end - part.begin} positions from {part.begin}")


def scores_checksum(tensors: Iterable[common_pb2.Tensor]) -> str:
    """Of the tensors of a ScoreResponse, in the order of their fields."""
    return tensors_checksum([(tensor.dtype, tensor.shape, tensor.data) for tensor in tensors])
