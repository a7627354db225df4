"""Processes of tests, which end with them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from foundry.local.ports import address_of, reserve
from foundry.local.process import child_options
from tests.forked import Forked

# Of a service whose work is over: one that waits for what the test took away is not waited for.
_END_SECONDS = 5.0


def spawn(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, stdout: IO[bytes] | int, stderr: IO[bytes] | int
) -> subprocess.Popen[bytes]:
    """Start a process as the local stack does: in a session of its own, told to end when this one dies."""
    return subprocess.Popen(command, env=env, stdout=stdout, stderr=stderr, **child_options())


class Process:
    """A service on ports that stay reserved, so that it can be killed and come back."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        directory: Path,
        environment: dict[str, str],
        *,
        module: str = "",
        address: str = "",
        python: str = "",
    ) -> None:
        """`module` runs instead of the service's own, with the same options, by `python` instead of this interpreter.
        `address`: one that nobody else takes."""
        self._held = None if address else reserve()
        self.address = address_of(self._held) if self._held else address
        self._held_for_metrics = reserve()
        self.metrics = address_of(self._held_for_metrics)
        self.log = directory / f"{name}-{self.address.replace(':', '-')}.log"
        self._module = module or f"services.{name}.main"
        ports = ["--listen", self.address, "--metrics-port", self.metrics.rpartition(":")[2]]
        self._arguments = [*ports, *arguments]
        self._python = python
        self._environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment
        self._process: subprocess.Popen[bytes] | Forked | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        self.log.touch()
        if not self._python:
            self._process = Forked(self._module, self._arguments, self._environment, self.log)
            return
        command = [self._python, "-m", self._module, *self._arguments]
        with self.log.open("ab") as log:
            self._process = spawn(command, env=self._environment, stdout=log, stderr=log)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """SIGSTOP: it keeps its connections and answers nobody."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        assert self._process is not None
        self._process.terminate()
        # Longer than any grace period, after which a cancellation that was lost comes again (`foundry.tasks`).
        status = self._process.wait(timeout=60)
        self._process = None
        return status

    def wait(self) -> int:
        """The exit status of a process that ends by itself."""
        assert self._process is not None
        status = self._process.wait(timeout=120)
        self._process = None
        return status

    def terminate(self) -> None:
        """SIGTERM, to one that is frozen too."""
        if self._process is not None:
            self._process.terminate()
            self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Ends it as it ends by itself, so that what it ran is counted, or kills it if that takes long."""
        self.terminate()
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_END_SECONDS)
        self.kill()
        self._held_for_metrics.close()
        if self._held is not None:
            self._held.close()

    def peak_bytes(self) -> int:
        """The most memory that the process has held."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    def check_alive(self) -> None:
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text()
