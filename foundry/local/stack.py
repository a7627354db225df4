"""`LocalStack`: start and stop the local stack from Python; `foundry up` and `foundry down` are this.

with LocalStack(model="demo") as stack:
    print(stack.url)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import psutil
from filelock import AcquireReturnProxy, FileLock, Timeout

from foundry import extras
from foundry.errors import BY_REASON, Conflict, FoundryError, InvalidArgument, Unavailable
from foundry.local.demo_model import DEMO, Say, demo_model_directory, resolve_model, say_on_stderr
from foundry.local.health import warnings_of
from foundry.local.home import Home, StackState
from foundry.local.log_files import earlier
from foundry.local.process import end

# Longer than the grace periods of all services one after the other.
_STOP_SECONDS = 90.0
_ORPHAN_SECONDS = 10.0


class LocalStack:
    """The stack of one FOUNDRY_HOME.

    `model` is 'demo', a directory or a hub id; None takes what is running, else the demo model. `port` is the
    gateway's; None takes the first free one from 8000. `say` gets one line for each stage.
    """

    def __init__(
        self, home: Path | None = None, model: str | None = None, port: int | None = None, say: Say = say_on_stderr
    ) -> None:
        self.home = Home(home)
        self._model, self._port, self._say = model, port, say
        self._process: subprocess.Popen[bytes] | None = None
        self._ours = False

    @property
    def url(self) -> str:
        """The gateway's address. Raises Unavailable if the stack is not running."""
        state = self.home.running()
        if state is None:
            raise Unavailable(f"no stack is running in {self.home.path}; start it with 'foundry up'")
        return state.gateway_url

    def up(self, *, tied: bool = False) -> StackState:
        """Start the stack, unless it is running, and return when it is ready. It outlives this process unless `tied`.

        Raises ExtraMissing, InvalidArgument if certificates are set, HomeUnusable, Conflict if it is running with
        another model or port, PortTaken, ModelNotFound, or Unavailable with the end of the log of the service that did
        not start. Interrupted, it leaves no process behind.
        """
        extras.require("local", extras.LOCAL)
        _refuse_certificates()
        self.home.create()
        with self._lock_up():
            running = self.home.running()
            if running is not None and running.state == "ready":
                self._check_same(running)
                return running
            # One that is there and not ready is stopping: whoever could be starting it would hold the lock.
            self._clear(stop=False)
            model = self._model or DEMO
            return self._start(model, resolve_model(model, self._say), tied=tied)

    def down(self) -> bool:
        """Stop the stack and return when its processes are gone. False if none was running."""
        was_running = self.home.running() is not None
        self._clear(stop=True)
        if self._process is not None:
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process.wait()
            self._process = None
        return was_running

    def __enter__(self) -> Self:
        """Up for the length of the block, even if this process is killed. A stack that was running before stays."""
        self._ours = self.home.running() is None
        self.up(tied=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ours:
            self.down()

    def _lock_up(self) -> AcquireReturnProxy[FileLock]:
        lock = FileLock(self.home.up_lock)
        with self.home.used():
            try:
                return lock.acquire(blocking=False)
            except Timeout:
                self._say("Another 'foundry up' is at work; waiting for it ...")
                return lock.acquire()

    def _clear(self, *, stop: bool) -> None:
        """Return when nothing of the stack in stack.json runs any more; with `stop` its supervisor is told to end."""
        state = self.home.read()
        if state is None:
            return
        if supervisor := state.process():
            end(supervisor, _STOP_SECONDS, tell=stop)
        # Had it been killed, on Linux the services have been told already. Who calls ends before who is called.
        for service in reversed(state.services.values()):
            if orphan := service.process():
                end(orphan, _ORPHAN_SECONDS, tell=True)
        self.home.forget()

    def _start(self, model: str, directory: Path, *, tied: bool) -> StackState:
        command = [sys.executable, "-m", "foundry.local.supervisor", "--home", str(self.home.path)]
        command += ["--model", model, "--model-directory", str(directory)]
        command += ["--port", str(self._port)] if self._port is not None else []
        command += ["--tied"] if tied else []
        self._say(f"Starting the stack with {model} ...")
        with self.home.used():
            for path in self.home.logs.glob("*.log"):
                path.rename(earlier(path))
            log_file = self.home.log_file("supervisor").open("ab")
        with log_file:
            # A session of its own: Ctrl-C in this terminal is for us, and closing it does not end the stack.
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                cwd=self.home.path,
                start_new_session=True,
            )
        assert process.stdin is not None, "asked for a pipe"
        assert process.stdout is not None, "asked for a pipe"
        try:
            self._wait_ready(process.stdout)
        except BaseException:
            # The lifeline: the supervisor stops what it has started and ends.
            process.stdin.close()
            end(psutil.Process(process.pid), _STOP_SECONDS, tell=False)
            process.wait()
            raise
        finally:
            process.stdout.close()
        # Tied, our end stays open for as long as we live; the supervisor stops when it closes.
        if not tied:
            process.stdin.close()
        self._process = process
        state = self.home.running()
        if state is None:
            raise Unavailable(f"the stack stopped as soon as it was ready; see {self.home.log_file('supervisor')}")
        for warning in warnings_of(state.gateway_url):
            self._say(f"Warning: {warning}")
        return state

    def _wait_ready(self, events: IO[bytes]) -> None:
        for line in events:
            event = json.loads(line)
            if event["event"] == "started":
                self._say(f"  {event['name']} is ready ({event['seconds']} s)")
            elif event["event"] == "failed":
                raise BY_REASON.get(event["reason"], FoundryError)(event["message"])
            elif event["event"] == "ready":
                return
        raise Unavailable(f"the supervisor ended while starting; its log is {self.home.log_file('supervisor')}")

    def _check_same(self, running: StackState) -> None:
        """Raises Conflict unless the running stack is the one that was asked for."""
        if self._model is not None and self._model != running.model:
            meant = demo_model_directory() if self._model == DEMO else Path(self._model).expanduser().absolute()
            if str(meant) != running.model_directory:
                raise Conflict(
                    f"the stack in {self.home.path} is running with the model {running.model}; run 'foundry down' "
                    f"first, or start another one beside it: FOUNDRY_HOME=DIRECTORY foundry up --model {self._model}",
                    field="model",
                )
        if self._port is not None and not running.gateway_url.endswith(f":{self._port}"):
            raise Conflict(
                f"the stack in {self.home.path} is running at {running.gateway_url}; run 'foundry down' first to move "
                "it to another port",
                field="port",
            )


def _refuse_certificates() -> None:
    """Every service would get them, and nobody here would reach it."""
    for name in sorted(os.environ):
        if name.startswith(("FOUNDRY_TLS_", "FOUNDRY_HTTPS_")):
            raise InvalidArgument(
                f"{name} is set: services of 'foundry up' listen on loopback only, without certificates; unset it"
            )
