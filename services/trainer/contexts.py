"""The documents that a run's cartridge stands in for, as the model reads them."""

from __future__ import annotations

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
    texts = {digest: await attempt.document(digest) for digest in attempt.spec.documents}
    return [Context(digest, text, template.context(text, max_tokens=max_tokens)) for digest, text in texts.items()]
