"""One fault: what it is and whether it has occurred."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Fault:
    """Armed at a seam, and fired once, by the first operation there that it fits."""

    kind: str
    detail: str = ""
    fired: bool = False

    def __str__(self) -> str:
        return f"{self.kind}({self.detail})"
