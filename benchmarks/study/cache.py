"""What several jobs need and only one of them makes: files in a directory, a lock for each."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock


@dataclass(frozen=True, slots=True)
class Made:
    """JSON, and how many seconds it took whoever made it."""

    content: Any
    seconds: float


class Cache:
    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory

    def get(self, name: str, key: object, make: Callable[[], Any]) -> Made:
        """What stands under `key`, any JSON; else what `make` makes, while others who want it wait."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        path = self._directory / f"{name}-{digest}.json"
        if not path.exists():
            with FileLock(path.with_suffix(".lock")):
                if not path.exists():
                    began = time.perf_counter()
                    content = make()
                    write_atomically(path, {"content": content, "seconds": time.perf_counter() - began})
        return Made(**json.loads(path.read_text()))


def write_atomically(path: Path, content: object) -> None:
    """Whoever reads `path` finds nothing, or all of it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", suffix=".partial", delete=False) as file:
        json.dump(content, file, separators=(",", ":"))
    os.replace(file.name, path)
