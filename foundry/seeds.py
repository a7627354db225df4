"""Seeds by place: every draw of a run is seeded by where it stands, so that no generator's state has to be kept."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *path: int | str) -> int:
    """A 63-bit seed for one place in a run, the same in every attempt."""
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
