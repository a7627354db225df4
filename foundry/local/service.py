"""One process of the stack: started, waited for, started again when it dies, stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from foundry.errors import DeadlineExceeded, Unavailable
from foundry.local.health import START_SECONDS
from foundry.local.home import process_start_time
from foundry.local.process import spawn

log = structlog.get_logger(__name__)

_BACKOFF_SECONDS = (0.2, 30.0)
# A service that stayed up for so long has recovered: its next death is a first one again.
_STEADY_SECONDS = 60.0
_LOG_LINES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to run one service. `ready` returns when it serves; it is called anew for every start."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    address: str
    ready: Callable[[], Awaitable[None]]
    grace_seconds: float


class Service:
    def __init__(self, plan: Plan, log_file: Path) -> None:
        self.plan = plan
        self.log_file = log_file
        self.restarts = 0
        self.pid = self.start_time = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._exited = asyncio.Event()

    def start(self) -> None:
        """Spawn the process. Raises OSError."""
        with self.log_file.open("ab") as sink:
            process = spawn(self.plan.command, env=self.plan.environment, stdout=sink, stderr=sink)
        self._process, self.pid = process, process.pid
        self.start_time = process_start_time(process.pid) or 0
        exited = self._exited = asyncio.Event()
        # A pidfd becomes readable when its process ends: no polling, no thread, no signal handler.
        descriptor = os.pidfd_open(process.pid)

        def on_exit() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            process.wait()
            exited.set()

        loop = asyncio.get_running_loop()
        loop.add_reader(descriptor, on_exit)

    async def wait_ready(self) -> None:
        """Return when the service serves.

        Raises Unavailable, with the end of its log, as soon as it exits instead, or DeadlineExceeded.
        """
        serving = asyncio.ensure_future(self.plan.ready())
        exited = asyncio.ensure_future(self._exited.wait())
        try:
            await asyncio.wait({serving, exited}, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                raise Unavailable(
                    f"{self.plan.name} ended with {self._how_it_ended()} while starting; its log is "
                    f"{self.log_file}\n{self._last_lines()}"
                )
            if not serving.done():
                raise DeadlineExceeded(
                    f"{self.plan.name} was not ready within {START_SECONDS:.0f} s; its log is {self.log_file}"
                )
            await serving
        finally:
            serving.cancel()
            exited.cancel()

    async def keep_running(self, on_change: Callable[[], None]) -> None:
        """Start the process again whenever it ends, later and later if it keeps dying. Runs until cancelled."""
        failures = 0
        while True:
            began = time.monotonic()
            await self._exited.wait()
            failures = 1 if time.monotonic() - began > _STEADY_SECONDS else failures + 1
            delay_seconds = min(_BACKOFF_SECONDS[1], _BACKOFF_SECONDS[0] * 2 ** (failures - 1))
            log.error("died", name=self.plan.name, how=self._how_it_ended(), restart_in_seconds=delay_seconds)
            await asyncio.sleep(delay_seconds)
            try:
                self.start()
            except OSError as error:
                log.error("cannot be started", name=self.plan.name, error=str(error))
                continue
            self.restarts += 1
            log.info("restarted", name=self.plan.name, pid=self.pid, restarts=self.restarts)
            on_change()

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL if the grace period was not enough."""
        if self._process is None:
            return
        if not self._exited.is_set():
            self._process.terminate()
            try:
                async with asyncio.timeout(self.plan.grace_seconds):
                    await self._exited.wait()
            except TimeoutError:
                log.warning("killed", name=self.plan.name, after_seconds=self.plan.grace_seconds)
                self._process.kill()
                await self._exited.wait()
        log.info("stopped", name=self.plan.name)

    def _how_it_ended(self) -> str:
        code = self._process.returncode if self._process is not None else None
        if code is not None and code < 0:
            return signal.Signals(-code).name
        return f"status {code}"

    def _last_lines(self) -> str:
        lines = self.log_file.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return "\n".join(f"  {line}" for line in lines)
