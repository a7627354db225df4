"""The teacher, asked one thing: how many tokens a document's context has."""

from __future__ import annotations

import structlog

from foundry.errors import DeadlineExceeded, DocumentTooLong, ResourceExhausted, Unavailable
from foundry.rpc.channel import open_channel, typed_errors
from foundry.rpc.limits import MAX_MESSAGE_BYTES
from foundry.v1 import teacher_pb2, teacher_pb2_grpc

log = structlog.get_logger(__name__)

_TIMEOUT_SECONDS = 60.0
_MAX_DOCUMENT_BYTES = MAX_MESSAGE_BYTES - 64 * 1024


class Teacher:
    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = open_channel(address)
        self._stub = teacher_pb2_grpc.TeacherStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def context_tokens(self, document: str, model_fingerprint: str) -> int | None:
        """Tokens of the document with its template; None if the teacher can't say now.

        Has the teacher compute the document's KV, which the run needs first of all. Raises DocumentTooLong,
        FingerprintMismatch.
        """
        if (num_bytes := len(document.encode())) > _MAX_DOCUMENT_BYTES:
            raise DocumentTooLong(
                f"the document has {num_bytes} bytes, a teacher takes at most {_MAX_DOCUMENT_BYTES}", field="document"
            )
        request = teacher_pb2.PutContextRequest(model_fingerprint=model_fingerprint, document=document)
        try:
            with typed_errors(self._address):
                return (await self._stub.PutContext(request, timeout=_TIMEOUT_SECONDS)).num_tokens
        except (Unavailable, DeadlineExceeded, ResourceExhausted) as error:
            log.warning("document not measured", address=self._address, error=error.message)
            return None
