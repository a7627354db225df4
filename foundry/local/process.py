"""Child processes that don't outlive their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import IO

_PR_SET_PDEATHSIG = 1


def spawn(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, stdout: IO[bytes] | int, stderr: IO[bytes] | int
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, with no input. Raises OSError.

    A session of its own, so that Ctrl-C at the terminal reaches only the supervisor, which stops the others in order.
    On Linux it gets SIGTERM when the thread that called this ends, so call it from one that lives long enough.
    """
    return subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        preexec_fn=_die_with_parent() if sys.platform == "linux" else None,
    )


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
