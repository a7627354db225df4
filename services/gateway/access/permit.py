"""What a request holds until it is answered."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Permit:
    """`headers` become those of its answer."""

    held: AsyncExitStack
    headers: dict[str, str] = field(default_factory=dict)
