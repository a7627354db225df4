"""The one process behind `foundry up`: starts the services, keeps them running, stops them.

    python -m foundry.local.supervisor --home DIRECTORY --model NAME --model-directory DIRECTORY [--port N] [--tied]

It speaks to whoever started it: JSON lines on standard output until it is ready or has failed. Standard input is a
lifeline: when it closes before the stack is ready (or at any time with --tied), the stack is stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

import structlog

from foundry import telemetry
from foundry.errors import Conflict, FoundryError, Unavailable
from foundry.local import ports
from foundry.local.home import Home, ServiceState, StackState, State, process_start_time
from foundry.local.plans import NAMES, make_plans
from foundry.local.service import Service

log = structlog.get_logger(__name__)


class Supervisor:
    def __init__(self, home: Home, model: str, model_directory: Path, port: int | None) -> None:
        """Reserves the ports. Raises PortTaken."""
        self.home = home
        gateway = ports.reserve_gateway() if port is None else ports.reserve_exactly(port)
        self._ports: dict[str, socket.socket] = {name: ports.reserve() for name in NAMES if name != "gateway"}
        self._ports["gateway"] = gateway
        addresses = {name: ports.address_of(held) for name, held in self._ports.items()}
        plans, redis_url = make_plans(home, model_directory, addresses)
        self.services = {plan.name: Service(plan, home.log_file(plan.name)) for plan in plans}
        start_time = process_start_time(os.getpid())
        assert start_time is not None, "this process runs"
        self._state = StackState(
            pid=os.getpid(),
            start_time=start_time,
            state="starting",
            model=model,
            model_directory=str(model_directory),
            gateway_url=f"http://{addresses['gateway']}",
            objects_url=home.objects.as_uri(),
            redis_url=redis_url,
        )
        self._keepers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Return when all services serve. Raises Unavailable as soon as one ends instead."""
        self.write_state("starting")
        valkey, *others = self.services.values()
        # The others look for the store as soon as they run.
        await self._start(valkey)
        try:
            async with asyncio.TaskGroup() as group:
                for service in others:
                    group.create_task(self._start(service))
        except* FoundryError as failures:
            # What failed first: the others failed because of it, or were cancelled.
            raise failures.exceptions[0] from None
        self._keepers = [
            asyncio.create_task(service.keep_running(lambda: self.write_state("ready")))
            for service in self.services.values()
        ]
        self.write_state("ready")

    async def stop(self) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        self.write_state("stopping")
        for name in NAMES:
            await self.services[name].stop()
        self.home.state_file.unlink(missing_ok=True)

    async def _start(self, service: Service) -> None:
        began = time.monotonic()
        service.start()
        self.write_state("starting")
        await service.wait_ready()
        seconds = round(time.monotonic() - began, 1)
        log.info("ready", name=service.plan.name, pid=service.pid, address=service.plan.address, seconds=seconds)
        report("started", name=service.plan.name, seconds=seconds)

    def write_state(self, state: State) -> None:
        self._state.state = state
        self._state.services = {
            name: ServiceState(
                service.plan.address, service.pid, service.start_time, service.restarts, str(service.log_file)
            )
            for name, service in self.services.items()
            if service.pid
        }
        self.home.write(self._state)


def report(event: str, **values: object) -> None:
    """Tell whoever started us, if they still listen."""
    with contextlib.suppress(BrokenPipeError, ValueError):
        print(json.dumps({"event": event, **values}), flush=True)


async def run(supervisor: Supervisor, *, tied: bool) -> None:
    """Start, report, keep running until told to stop, stop. Raises what made the start fail."""
    loop = asyncio.get_running_loop()
    stopping, ready = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stopping.set)

    def on_input() -> None:
        if not os.read(0, 4096):
            loop.remove_reader(0)
            if tied or not ready.is_set():
                stopping.set()

    loop.add_reader(0, on_input)
    starting = asyncio.create_task(supervisor.start())
    told = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({starting, told}, return_when=asyncio.FIRST_COMPLETED)
        if stopping.is_set():
            raise Unavailable("the stack was told to stop while it was starting")
        await starting
        ready.set()
        report("ready")
        await told
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await supervisor.stop()


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
        with home.supervisor_lock.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Conflict(f"another supervisor is at work in {home.path}: wait, or run 'foundry down'") from error
            asyncio.run(run(Supervisor(home, options.model, options.model_directory, options.port), tied=options.tied))
    except FoundryError as error:
        log.error("stopped", reason=error.reason, error=error.message)
        report("failed", reason=error.reason, message=error.message)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
