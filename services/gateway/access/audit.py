"""Who changed what, and who was refused: a line of JSON for each such request."""

from __future__ import annotations

import asyncio
import json
import os
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from foundry.errors import InvalidArgument
from services.gateway import metrics

log = structlog.get_logger(__name__)
# By this name it can be told from the gateway's other lines.
audit_log = structlog.get_logger("foundry.audit")

# Of the file, while a disk does not answer.
_MAX_WAITING_LINES = 10_000


class AuditLog:
    """Every line is logged, and with a file appended to that too. Requests don't wait for the file, and go on without
    it: what could not be written there is counted."""

    def __init__(self, path: Path | None) -> None:
        """Raises InvalidArgument if the file can't be written."""
        self._path = path
        self._waiting: deque[str] = deque()
        self._added = asyncio.Event()
        # The last line may have been written in part.
        self._torn = False
        if path is not None:
            try:
                os.close(_open(path))
            except OSError as error:
                raise InvalidArgument(f"audit_log_file can't be written: {error}", field="audit_log_file") from None

    def add(self, entry: Mapping[str, Any]) -> None:
        audit_log.info("request", **entry)
        if self._path is None:
            return
        if len(self._waiting) >= _MAX_WAITING_LINES:
            _lost(1, f"{_MAX_WAITING_LINES} lines wait to be written")
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._waiting.append(json.dumps({"time": now, **entry}))
        self._added.set()

    async def write(self) -> None:
        """Append what is added to the file, until cancelled."""
        while True:
            await self._added.wait()
            self._added.clear()
            await asyncio.to_thread(self.flush)

    def flush(self) -> None:
        """Append what waits."""
        if self._path is None or not self._waiting:
            return
        try:
            # Anew each time: what rotates files moves them away.
            file = _open(self._path)
        except OSError as error:
            _lost(len(self._waiting), str(error))
            self._waiting.clear()
            return
        try:
            while self._waiting:
                self._append(file, self._waiting.popleft())
        finally:
            os.close(file)

    def _append(self, file: int, line: str) -> None:
        content = (b"\n" if self._torn else b"") + line.encode() + b"\n"
        try:
            # One call, which the system appends as a whole: gateways may share the file.
            written = os.write(file, content)
        except OSError as error:
            _lost(1, str(error))
            return
        self._torn = written < len(content)
        if self._torn:
            _lost(1, f"{written} of {len(content)} bytes were written")


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _lost(num_lines: int, error: str) -> None:
    metrics.AUDIT_LINES_LOST.inc(num_lines)
    log.error("audit lines are in this log alone: audit_log_file does not take them", lines=num_lines, error=error)
