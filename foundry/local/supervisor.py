"""The one process behind `foundry up`: starts the services, keeps them running, stops them.

    python -m foundry.local.supervisor --home DIRECTORY --model NAME --model-directory DIRECTORY [--port N] [--tied]

It speaks to whoever started it: JSON lines on standard output until it is ready or has failed. Standard input is a
lifeline: when it closes before the stack is ready (or at any time with --tied), the stack is stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import structlog
from filelock import AcquireReturnProxy, FileLock, Timeout

from foundry import telemetry
from foundry.errors import Conflict, FoundryError, Unavailable
from foundry.local import ports
from foundry.local.home import Home, StackState, State
from foundry.local.layout import make_services
from foundry.local.log_files import keep_short
from foundry.local.process import start_time
from foundry.local.service import Service

log = structlog.get_logger(__name__)


class Supervisor:
    def __init__(self, home: Home, model: str, model_directory: Path, port: int | None) -> None:
        """Reserves the ports. Raises PortTaken and HomeUnusable."""
        self.home = home
        self._ports = {name: ports.reserve() for name in ("valkey", "teacher", "rollout", "trainer")}
        self._ports["gateway"] = ports.reserve_gateway() if port is None else ports.reserve(port, lingering=True)
        addresses = {name: ports.address_of(held) for name, held in self._ports.items()}
        if sys.platform != "linux":
            # Two sockets can't share a port there, so the numbers have to do: different, because all were held at once.
            for held in self._ports.values():
                held.close()
        self.services, redis_url = make_services(home, model_directory, addresses)
        self._state = StackState(
            pid=os.getpid(),
            start_time=start_time(psutil.Process()),
            state="starting",
            model=model,
            model_directory=str(model_directory),
            gateway_url=f"http://{addresses['gateway']}",
            objects_url=home.objects.as_uri(),
            redis_url=redis_url,
        )

    async def run(self, *, tied: bool) -> None:
        """Start, report, keep running until told to stop, stop. Raises what made the start fail."""
        loop = asyncio.get_running_loop()
        working = loop.create_task(self._work())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, working.cancel)

        def on_input() -> None:
            if not os.read(0, 4096):
                loop.remove_reader(0)
                if tied or self._state.state != "ready":
                    working.cancel()

        loop.add_reader(0, on_input)
        try:
            await working
        except asyncio.CancelledError:
            if self._state.state != "ready":
                raise Unavailable("the stack was told to stop while it was starting") from None
        finally:
            await self._stop()

    async def _work(self) -> None:
        """Start all services, keep them running until cancelled. Raises Unavailable if one ends while starting."""
        self._write("starting")
        valkey, *others = self.services
        # The others look for the store as soon as they run.
        await self._start(valkey)
        try:
            async with asyncio.TaskGroup() as group:
                for service in others:
                    group.create_task(self._start(service))
        except* FoundryError as failures:
            # What failed first: the others failed because of it, or were cancelled.
            raise failures.exceptions[0] from None
        self._write("ready")
        report("ready")
        async with asyncio.TaskGroup() as group:
            for service in self.services:
                group.create_task(service.keep_running(lambda: self._write("ready")))
            logs = [self.home.log_file("supervisor"), *(service.state.log for service in self.services)]
            group.create_task(keep_short(logs))

    async def _start(self, service: Service) -> None:
        began = time.monotonic()
        await service.start()
        self._write("starting")
        await service.wait_ready()
        seconds = round(time.monotonic() - began, 1)
        state = service.state
        log.info("ready", name=service.name, pid=state.pid, address=state.address, seconds=seconds)
        report("started", name=service.name, seconds=seconds)

    async def _stop(self) -> None:
        self._write("stopping")
        for service in reversed(self.services):
            await service.stop()
        self.home.forget()

    def _write(self, state: State) -> None:
        self._state.state = state
        self._state.services = {service.name: service.state for service in self.services if service.state.pid}
        self.home.write(self._state)


def report(event: str, **values: object) -> None:
    """Tell whoever started us, if they still listen."""
    with contextlib.suppress(BrokenPipeError, ValueError):
        print(json.dumps({"event": event, **values}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m foundry.local.supervisor")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--model-directory", type=Path, required=True)
    parser.add_argument("--port", type=int)
    parser.add_argument("--tied", action="store_true")
    options = parser.parse_args()
    telemetry.configure_logs("supervisor", "info")
    # It would log every look at whether the gateway is ready.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    home = Home(options.home)
    try:
        with hold(home):
            supervisor = Supervisor(home, options.model, options.model_directory, options.port)
            asyncio.run(supervisor.run(tied=options.tied))
    except FoundryError as error:
        return failed(error)
    return 0


def hold(home: Home) -> AcquireReturnProxy[FileLock]:
    """Raises Conflict if another supervisor lives, and HomeUnusable."""
    with home.used():
        try:
            return FileLock(home.supervisor_lock).acquire(blocking=False)
        except Timeout:
            raise Conflict(f"another supervisor is at work in {home.path}: wait, or run 'foundry down'") from None


def failed(error: FoundryError) -> int:
    log.error("stopped", reason=error.reason, error=error.message)
    report("failed", reason=error.reason, message=error.message)
    return 1


if __name__ == "__main__":
    sys.exit(main())
