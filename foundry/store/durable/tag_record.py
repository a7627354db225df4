"""What a tag means and meant before: in Redis, which orders concurrent moves, and in object storage, which keeps it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from foundry.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class TagRecord:
    """`history`: versions that it meant before, newest first, at most MAX_TAG_HISTORY. `moved_ms`: when, by Redis'
    clock; 0 where that is not known. It makes two records differ although a tag went back to what it meant."""

    version: int
    history: tuple[int, ...] = ()
    moved_ms: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> TagRecord:
        """Raises InvalidArgument. A record without history, as older releases wrote it, has none."""
        try:
            values = json.loads(text)
            history = tuple(int(version) for version in values.get("history", ()))
            return cls(int(values["version"]), history, int(values.get("moved_ms", 0)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidArgument(f"the record of a tag is unreadable: {error!r}") from error
