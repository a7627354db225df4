"""FOUNDRY_HOME: where a local stack keeps its state, data and logs, and whether it is running.

stack.json        what runs, where (0600: it holds the password of the private Valkey)
supervisor.lock   held by the supervisor for as long as it lives
up.lock           held while somebody starts or stops the stack
logs/             one file per process, the one before beside it as NAME.log.1
objects/          cartridges, documents, checkpoints: the durable truth
valkey/           pointers, runs, events
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["starting", "ready", "stopping"]


@dataclass(slots=True)
class ServiceState:
    address: str
    pid: int
    start_time: int
    restarts: int
    log: str


@dataclass(slots=True)
class StackState:
    """The content of stack.json. `start_time` tells a process from a later one with the same pid."""

    pid: int
    start_time: int
    state: State
    # As the user wrote it, and the directory that it meant.
    model: str
    model_directory: str
    gateway_url: str
    objects_url: str
    redis_url: str
    services: dict[str, ServiceState] = field(default_factory=dict)

    def alive(self) -> bool:
        return process_start_time(self.pid) == self.start_time

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StackState:
        services = {name: ServiceState(**service) for name, service in values.pop("services").items()}
        return cls(**values, services=services)


class Home:
    def __init__(self, path: Path | None = None) -> None:
        self.path = (path or default_home()).expanduser().absolute()
        self.state_file = self.path / "stack.json"
        self.up_lock = self.path / "up.lock"
        self.supervisor_lock = self.path / "supervisor.lock"
        self.logs = self.path / "logs"
        self.objects = self.path / "objects"
        self.valkey = self.path / "valkey"

    def create(self) -> None:
        for directory in (self.path, self.logs, self.objects, self.valkey):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def log_file(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def read(self) -> StackState | None:
        """What stack.json says, or None if there is none, or it is of another version or damaged."""
        try:
            return StackState.from_dict(json.loads(self.state_file.read_text()))
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def running(self) -> StackState | None:
        """The state of the stack whose supervisor is alive, whatever is left from one that died."""
        state = self.read()
        return state if state is not None and state.alive() else None

    def write(self, state: StackState) -> None:
        """Readers see the old file or the new one."""
        temporary = self.state_file.with_suffix(".json.new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(state), file, indent=2)
        temporary.rename(self.state_file)


def default_home() -> Path:
    """FOUNDRY_HOME, or cartridge-foundry in the user's data directory."""
    if configured := os.environ.get("FOUNDRY_HOME"):
        return Path(configured)
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share") / "cartridge-foundry"


def process_start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of the process, None if it is gone or only waits to be reaped."""
    try:
        # The command's name, in parentheses, may hold spaces: fields are counted from its end (proc_pid_stat(5)).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
