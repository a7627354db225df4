"""What a collection leaves, and what it takes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal


@dataclass(frozen=True, slots=True)
class Retention:
    """Which durable versions of a name are wanted, and for how long what is kept beside them. None: no such limit.
    Either limit on versions alone lets one go."""

    keep_last: int | None
    max_age_days: float | None
    keep_runs_days: float | None
    keep_documents_days: float | None
    grace_seconds: float
    keep_hot: int

    def old(self, began: datetime, days: float = 0.0) -> datetime:
        """What is from before may go in a collection that `began`: for `days`, and never shorter than the grace."""
        # Compared with the object storage's clock: the grace covers what it is off.
        return began - max(timedelta(days=days), timedelta(seconds=self.grace_seconds))


@dataclass(frozen=True, slots=True)
class Collected:
    """One thing that went, or would go. `num_bytes` is 0 for bytes that another version still needs."""

    kind: Literal["hot", "version", "blob", "run", "checkpoint", "document", "dataset", "file", "batch"]
    key: str
    num_bytes: int
    why: str
