"""Logs of a stack that runs for months: one that has grown large becomes NAME.log.1, and goes on empty."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

MAX_BYTES = 64 * 2**20
_LOOK_SECONDS = 10.0


def earlier(path: Path) -> Path:
    """Where the log of before is."""
    return path.with_name(f"{path.name}.1")


def shorten(path: Path, max_bytes: int) -> None:
    """Copied and cut, since the process that writes it has it open, to append. Lines between the two are lost."""
    if path.exists() and path.stat().st_size > max_bytes:
        shutil.copyfile(path, earlier(path))
        os.truncate(path, 0)


async def keep_short(logs: Iterable[Path]) -> None:
    """Runs until cancelled."""
    paths = list(logs)
    while True:
        for path in paths:
            try:
                await asyncio.to_thread(shorten, path, MAX_BYTES)
            except OSError as error:
                log.warning("log not shortened", path=str(path), error=str(error))
        await asyncio.sleep(_LOOK_SECONDS)
