"""A directory as object storage, where obstore does not: its lock for compare-and-set, and what a power cut needs."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foundry.errors import StoreRefused, StoreUnavailable

LOCK = ".lock"
_LOCK_SECONDS = 10.0


def make_directory(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except PermissionError as error:
        raise StoreRefused(f"can't make the object store's directory {root}: {error}") from error
    except OSError as error:
        raise StoreUnavailable(f"can't make the object store's directory {root}: {error}") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on `path`. A file, because over NFS a directory can't be locked; never deleted, because a writer
    might wait for the one that is gone."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        # Not a wait without end: its thread could not be cancelled.
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StoreUnavailable(
                        f"another process has held {path} for {_LOCK_SECONDS:.0f} s: is it stopped?"
                    ) from None
                time.sleep(0.005)
        yield
    finally:
        os.close(descriptor)


def fsync(path: Path) -> None:
    """What was reported as stored survives a power cut: the bytes first, then the directory entry."""
    for target in (path, path.parent):
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
