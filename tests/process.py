"""Processes of tests, which end with them."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from typing import IO

from foundry.local.process import child_options


def spawn(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, stdout: IO[bytes] | int, stderr: IO[bytes] | int
) -> subprocess.Popen[bytes]:
    """Start a process as the local stack does: in a session of its own, told to end when this one dies."""
    return subprocess.Popen(command, env=env, stdout=stdout, stderr=stderr, **child_options())
