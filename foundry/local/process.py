"""Processes that are known again by pid and start, and children that don't outlive their parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import psutil

_PR_SET_PDEATHSIG = 1


def start_time(process: psutil.Process) -> float:
    """Tells a process from a later one with the same pid, in seconds."""
    # On Linux the kernel counts from boot and psutil adds the time of boot, which changes when the clock is set.
    return round(process.create_time() - (psutil.boot_time() if psutil.LINUX else 0.0), 2)


def find(pid: int, started: float) -> psutil.Process | None:
    """The process with this pid and start, None if it is gone or only waits to be reaped."""
    try:
        process = psutil.Process(pid)
        if start_time(process) == started and process.status() != psutil.STATUS_ZOMBIE:
            return process
    except psutil.Error:
        pass
    return None


def end(process: psutil.Process, timeout_seconds: float, *, tell: bool) -> None:
    """Return when it has ended: by SIGTERM with `tell`, else by itself, by SIGKILL if it takes too long."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if tell:
            process.terminate()
        try:
            process.wait(timeout_seconds)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait()


def child_options() -> dict[str, Any]:
    """Options of Popen and create_subprocess_exec for a child without input, in a session of its own.

    A session of its own, so that Ctrl-C at the terminal reaches only the supervisor, which stops the others in order.
    On Linux it gets SIGTERM when the thread that called this ends, so start it from one that lives long enough.
    """
    die_with_parent = _die_with_parent() if sys.platform == "linux" else None
    return {"stdin": subprocess.DEVNULL, "start_new_session": True, "preexec_fn": die_with_parent}


def _die_with_parent() -> Callable[[], None]:
    # All that takes locks is done here: between fork and exec another thread may hold them for ever.
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            # It died before we asked.
            os._exit(1)

    return arrange
