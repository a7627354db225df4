"""Warnings and errors that repeat themselves: so many of a kind, then how many were left out."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

# Of one kind.
MAX_LINES = 100
WINDOW_SECONDS = 10.0
# What says something new with every line is of no kind: then all are forgotten.
_MAX_KINDS = 1000


@dataclass(slots=True)
class _Window:
    began: float
    num_lines: int = 0


class LogLimit(logging.Filter):
    """Lets `MAX_LINES` warnings and errors of a kind pass in a window; the next window's first says in `left_out` how
    many did not. Of a kind are those of one logger that say the same, whatever values they have."""

    def __init__(self) -> None:
        super().__init__()
        self._windows: dict[tuple[str, int, str], _Window] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        # Our own lines are dictionaries until they are rendered.
        said = str(record.msg.get("event")) if isinstance(record.msg, dict) else str(record.msg)
        with self._lock:
            if len(self._windows) >= _MAX_KINDS:
                self._windows.clear()
            kind = (record.name, record.levelno, said)
            window = self._windows.setdefault(kind, _Window(record.created))
            if record.created - window.began >= WINDOW_SECONDS:
                num_left_out = window.num_lines - MAX_LINES
                window = self._windows[kind] = _Window(record.created)
                if num_left_out > 0:
                    _add(record, num_left_out)
            window.num_lines += 1
            return window.num_lines <= MAX_LINES


def _add(record: logging.LogRecord, num_left_out: int) -> None:
    if isinstance(record.msg, dict):
        record.msg = {**record.msg, "left_out": num_left_out}
    else:
        record.left_out = num_left_out
