"""One process of the stack: started, waited for, started again when it dies, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil
import structlog

from foundry.errors import DeadlineExceeded, Unavailable
from foundry.local.health import START_SECONDS
from foundry.local.home import ServiceState
from foundry.local.process import child_options, start_time

log = structlog.get_logger(__name__)

_BACKOFF_SECONDS = (0.2, 30.0)
# A service that stayed up for so long has recovered: its next death is a first one again.
_STEADY_SECONDS = 60.0
_LOG_LINES = 12


@dataclass(slots=True, kw_only=True)
class Service:
    """`ready` returns when the service serves; it is called anew for every start."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    ready: Callable[[], Awaitable[None]]
    grace_seconds: float
    state: ServiceState
    _process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Spawn the process. Raises Unavailable if the system refuses it, or its log."""
        try:
            with self.state.log.open("ab") as sink:
                self._process = await asyncio.create_subprocess_exec(
                    *self.command, env=self.environment, stdout=sink, stderr=sink, **child_options()
                )
        except OSError as error:
            raise Unavailable(f"{self.name} can't be started: {error}") from error
        self.state.pid = self._process.pid
        # It may have ended already.
        with contextlib.suppress(psutil.NoSuchProcess):
            self.state.start_time = start_time(psutil.Process(self._process.pid))

    async def wait_ready(self) -> None:
        """Return when the service serves.

        Raises Unavailable, with the end of its log, as soon as it exits instead, or DeadlineExceeded.
        """
        assert self._process is not None, "started"
        serving = asyncio.ensure_future(self.ready())
        exited = asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait({serving, exited}, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                lines = self.state.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
                raise Unavailable(
                    f"{self.name} ended with {how_it_ended(exited.result())} while starting; its log is "
                    + "\n  ".join([str(self.state.log), *lines])
                )
            if not serving.done():
                raise DeadlineExceeded(
                    f"{self.name} was not ready within {START_SECONDS:.0f} s; its log is {self.state.log}"
                )
            await serving
        finally:
            serving.cancel()
            exited.cancel()

    async def keep_running(self, on_change: Callable[[], None]) -> None:
        """Start the process again whenever it ends, later and later if it keeps dying. Runs until cancelled."""
        failures = 0
        while True:
            assert self._process is not None, "started"
            began = time.monotonic()
            status = await self._process.wait()
            failures = 1 if time.monotonic() - began > _STEADY_SECONDS else failures + 1
            delay_seconds = min(_BACKOFF_SECONDS[1], _BACKOFF_SECONDS[0] * 2 ** (failures - 1))
            log.error("died", name=self.name, how=how_it_ended(status), restart_in_seconds=delay_seconds)
            await asyncio.sleep(delay_seconds)
            try:
                await self.start()
            except Unavailable as error:
                log.error("cannot be started", name=self.name, error=error.message)
                continue
            self.state.restarts += 1
            log.info("restarted", name=self.name, pid=self.state.pid, restarts=self.state.restarts)
            on_change()

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL if the grace period was not enough."""
        if self._process is None:
            return
        if self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), self.grace_seconds)
            except TimeoutError:
                log.warning("killed", name=self.name, after_seconds=self.grace_seconds)
                self._process.kill()
                await self._process.wait()
        log.info("stopped", name=self.name)


def how_it_ended(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"
