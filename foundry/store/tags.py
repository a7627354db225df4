"""What a tag means and meant before: in Redis, which orders concurrent moves, and in object storage, which keeps it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from foundry.store.names import MAX_VERSION
from foundry.store.sealed import seal, unseal
from foundry.validation import Checked

# Versions that a tag meant before and can go back to.
MAX_TAG_HISTORY = 32

_Version = Annotated[int, Field(ge=1, le=MAX_VERSION)]


class TagRecord(Checked):
    """`history`: versions that it meant before, newest first, at most MAX_TAG_HISTORY. `moved_ms`: when, by Redis'
    clock; 0 where that is not known. It makes two records differ although a tag went back to what it meant."""

    version: _Version
    # JSON has no tuples.
    history: tuple[_Version, ...] = Field(default=(), strict=False, max_length=MAX_TAG_HISTORY)
    moved_ms: int = Field(default=0, ge=0, le=MAX_VERSION)

    def to_json(self) -> str:
        return seal(self.model_dump())

    @classmethod
    def from_json(cls, text: str | bytes) -> TagRecord:
        """Raises InvalidArgument."""
        return cls.model_validate(unseal(text))
