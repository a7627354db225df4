"""FOUNDRY_HOME: where a local stack keeps its state, data and logs, and whether it is running.

stack.json        what runs, where (0600: it holds the password of the private Valkey)
supervisor.lock   held by the supervisor for as long as it lives
up.lock           held while somebody starts the stack
logs/             one file per process, what was before beside it as NAME.log.1: of the last stack, or from 64 MiB on
objects/          cartridges, documents, checkpoints: the durable truth
valkey/           pointers, runs, events
tracking/         a file of JSON lines for each run, and what trackers write
tokens/           what the services show each other (foundry/rpc/tokens.py)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import psutil
from platformdirs import user_data_path
from pydantic import BaseModel, ValidationError

from foundry.errors import HomeUnusable
from foundry.local.process import find

State = Literal["starting", "ready", "stopping"]


class ProcessState(BaseModel):
    pid: int = 0
    start_time: float = 0.0

    def process(self) -> psutil.Process | None:
        """None if it does not run any more, whoever has its pid now."""
        return find(self.pid, self.start_time)


class ServiceState(ProcessState):
    address: str
    # Where it serves /metrics, if FOUNDRY_METRICS_PORT asks for that.
    metrics: str | None
    restarts: int = 0
    log: Path


class StackState(ProcessState):
    """The content of stack.json; the process is the supervisor's."""

    state: State
    # As the user wrote it, and the directory that it meant.
    model: str
    model_directory: str
    gateway_url: str
    objects_url: str
    redis_url: str
    # In the order in which they are started.
    services: dict[str, ServiceState] = {}


class Home:
    def __init__(self, path: Path | None = None) -> None:
        self.path = (path or default_home()).expanduser().absolute()
        self.state_file = self.path / "stack.json"
        self.up_lock = self.path / "up.lock"
        self.supervisor_lock = self.path / "supervisor.lock"
        self.logs = self.path / "logs"
        self.objects = self.path / "objects"
        self.valkey = self.path / "valkey"
        self.tokens = self.path / "tokens"
        self.tracking = self.path / "tracking"

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within it, what the system refuses raises HomeUnusable."""
        try:
            yield
        except OSError as error:
            raise HomeUnusable(
                f"cannot use {error.filename or self.path}: {error.strerror}; FOUNDRY_HOME must be a directory that "
                "can be written"
            ) from error

    def create(self) -> None:
        """Raises HomeUnusable."""
        with self.used():
            for directory in (self.path, self.logs, self.objects, self.valkey):
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def log_file(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def read(self) -> StackState | None:
        """What stack.json says, or None if there is none, or it is of another version or damaged.

        Raises HomeUnusable.
        """
        with self.used():
            try:
                return StackState.model_validate_json(self.state_file.read_bytes())
            except (FileNotFoundError, NotADirectoryError, ValidationError):
                return None

    def running(self) -> StackState | None:
        """The state of the stack whose supervisor is alive, whatever is left from one that died."""
        state = self.read()
        return state if state is not None and state.process() else None

    def write(self, state: StackState) -> None:
        """Readers see the old file or the new one. Raises HomeUnusable."""
        temporary = self.state_file.with_suffix(".json.new")
        with self.used():
            temporary.touch(mode=0o600)
            temporary.write_text(state.model_dump_json(indent=2))
            temporary.rename(self.state_file)

    def forget(self) -> None:
        """No stack runs here any more. Raises HomeUnusable."""
        with self.used():
            self.state_file.unlink(missing_ok=True)


def default_home() -> Path:
    """FOUNDRY_HOME, or cartridge-foundry in the user's data directory."""
    return Path(os.environ.get("FOUNDRY_HOME") or user_data_path("cartridge-foundry"))
