"""What a tag means and meant before: in Redis, which orders concurrent moves, and in object storage, which keeps it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from foundry.errors import InvalidArgument
from foundry.store.sealed import seal, unseal

# Versions that a tag meant before and can go back to.
MAX_TAG_HISTORY = 32


@dataclass(frozen=True, slots=True)
class TagRecord:
    """`history`: versions that it meant before, newest first, at most MAX_TAG_HISTORY. `moved_ms`: when, by Redis'
    clock; 0 where that is not known. It makes two records differ although a tag went back to what it meant."""

    version: int
    history: tuple[int, ...] = ()
    moved_ms: int = 0

    def to_json(self) -> str:
        return seal(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> TagRecord:
        """Raises InvalidArgument."""
        values = unseal(text, "tag")
        try:
            history = tuple(int(version) for version in values["history"])
            return cls(int(values["version"]), history, int(values["moved_ms"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgument(f"the record of a tag is unreadable: {error!r}") from error
