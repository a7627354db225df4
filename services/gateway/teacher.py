"""The teacher, asked one thing: how many tokens a document's context has."""

from __future__ import annotations

import structlog

from foundry.errors import DeadlineExceeded, DocumentTooLong, ResourceExhausted, Unavailable
from foundry.identity import content_digest
from foundry.rpc.limits import MAX_MESSAGE_BYTES
from foundry.rpc.pods import Pods, rendezvous
from foundry.v1 import teacher_pb2, teacher_pb2_grpc

log = structlog.get_logger(__name__)

_TIMEOUT_SECONDS = 60.0
_MAX_DOCUMENT_BYTES = MAX_MESSAGE_BYTES - 64 * 1024


class Teacher:
    def __init__(self, pods: Pods) -> None:
        """`pods` are closed with it."""
        self._pods = pods

    async def close(self) -> None:
        await self._pods.close()

    async def context_tokens(self, document: str, model_fingerprint: str) -> int | None:
        """Tokens of the document with its template; None if the teacher can't say now.

        Has the teacher compute the document's KV, which the run needs first of all, where the trainer will ask for it.
        Raises DocumentTooLong, FingerprintMismatch.
        """
        if (num_bytes := len(document.encode())) > _MAX_DOCUMENT_BYTES:
            raise DocumentTooLong(
                f"the document has {num_bytes} bytes, a teacher takes at most {_MAX_DOCUMENT_BYTES}", field="document"
            )
        request = teacher_pb2.PutContextRequest(model_fingerprint=model_fingerprint, document=document)
        try:
            key = content_digest(document.encode())
            pod = max(await self._pods.reachable(), key=lambda pod: rendezvous(key, pod.address))
            with pod.calling() as channel:
                stub = teacher_pb2_grpc.TeacherStub(channel)
                return (await stub.PutContext(request, timeout=_TIMEOUT_SECONDS)).num_tokens
        except (Unavailable, DeadlineExceeded, ResourceExhausted) as error:
            log.warning("document not measured", error=error.message)
            return None
