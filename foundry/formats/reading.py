"""Files that may be damaged or somebody else's: read up to a bound, or a typed error."""

from __future__ import annotations

from pathlib import Path

from foundry.errors import CartridgeUnreadable

MAX_BYTES = 16 * 2**30
MAX_CONFIG_BYTES = 2**20


def read_file(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Raises CartridgeUnreadable."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise CartridgeUnreadable(f"{path} has {size} bytes, at most {max_bytes} are read", field="path")
        return path.read_bytes()
    except OSError as error:
        raise CartridgeUnreadable(f"{path} can't be read: {error.strerror}", field="path") from error
