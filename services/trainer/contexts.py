"""The documents that a run's cartridge stands in for, as the model reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from foundry.identity import ids_digest
from foundry.model.template import ChatTemplate
from services.trainer.attempt import Attempt


@dataclass(frozen=True, slots=True)
class Context:
    """`ids` stand before a turn where its teacher answers; without a document, what a template puts there itself."""

    # Digest of the stored text.
    document: str
    text: str
    ids: Sequence[int]

    @property
    def digest(self) -> str:
        return ids_digest(self.ids)


async def read_contexts(attempt: Attempt, template: ChatTemplate, max_tokens: int) -> list[Context]:
    """In the run's order. Raises DocumentNotFound, DocumentUnreadable and DocumentTooLong."""
    contexts = []
    for digest in attempt.spec.documents:
        text = await attempt.document(digest)
        # In a thread, since a long one takes seconds, in which the run would give no sign of life.
        ids = await asyncio.to_thread(template.context, text, max_tokens=max_tokens)
        contexts.append(Context(digest, text, ids))
    return contexts
