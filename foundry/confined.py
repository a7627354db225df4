"""Processes that read files which strangers made: without this one's secrets, within bounds that the system keeps."""

from __future__ import annotations

import os
import resource
import sys

# Exit status of a reader that has said why in one line on standard error; those of Python itself are others.
UNREADABLE = 3


def command(module: str, *arguments: object) -> list[str]:
    """Runs a module, found where this process finds it and nowhere else."""
    return [sys.executable, "-P", "-m", module, *map(str, arguments)]


def environment() -> dict[str, str]:
    """All that it gets: of this process's environment nothing."""
    return {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}


def bound(seconds: int, memory_bytes: int, file_bytes: int = 0) -> None:
    """This process from now on: CPU time, address space, and how long a file it may write."""
    for what, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def failed(why: str) -> int:
    """The reader's exit status, its reason said."""
    print(" ".join(why.split())[:300], file=sys.stderr)
    return UNREADABLE
