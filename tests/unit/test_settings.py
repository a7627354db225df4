"""What is wrong with a service's settings is said in one line each, and what concerns others is left alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from foundry import variables
from foundry.settings import ServiceSettings
from services.gateway.settings import GatewaySettings
from services.rollout.settings import RolloutSettings
from services.teacher.settings import TeacherSettings
from services.trainer.settings import TrainerSettings

ROOT = Path(__file__).parents[2]
SERVICES: tuple[type[ServiceSettings], ...] = (GatewaySettings, RolloutSettings, TeacherSettings, TrainerSettings)
PLANTED = "planted-secret"
STORE = {"FOUNDRY_STORE__REDIS_URL": "redis://h", "FOUNDRY_STORE__OBJECTS_URL": "file:///x"}
# As Kubernetes sets them in every pod for Services called foundry-rollout and foundry.
SERVICE_LINKS = {
    "FOUNDRY_ROLLOUT_SERVICE_HOST": "10.0.0.1",
    "FOUNDRY_ROLLOUT_SERVICE_PORT": "7001",
    "FOUNDRY_ROLLOUT_SERVICE_PORT_GRPC": "7001",
    "FOUNDRY_ROLLOUT_PORT": "tcp://10.0.0.1:7001",
    "FOUNDRY_ROLLOUT_PORT_7001_TCP": "tcp://10.0.0.1:7001",
    "FOUNDRY_ROLLOUT_PORT_7001_TCP_PROTO": "tcp",
    "FOUNDRY_ROLLOUT_PORT_7001_TCP_PORT": "7001",
    "FOUNDRY_ROLLOUT_PORT_7001_TCP_ADDR": "10.0.0.1",
    "FOUNDRY_SERVICE_HOST": "10.0.0.2",
    "FOUNDRY_PORT": "tcp://10.0.0.2:80",
}


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Mapping[str, str], list[str]], list[str]]:
    """What the gateway says of an environment and options that it refuses."""

    def parse(environment: Mapping[str, str], options: list[str]) -> list[str]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            GatewaySettings.parse(options)
        assert ended.value.code == 2
        printed = capsys.readouterr()
        assert PLANTED not in printed.out + printed.err
        return printed.err.splitlines()

    return parse


@pytest.mark.parametrize(
    ("environment", "options", "lines"),
    [
        (
            {},
            [],
            [
                "error: FOUNDRY_STORE__REDIS_URL (--store.redis-url): required",
                "error: FOUNDRY_STORE__OBJECTS_URL (--store.objects-url): required",
            ],
        ),
        (
            STORE | {"FOUNDRY_STORE__REDIS_PASWORD": PLANTED, "FOUNDRY_STORE__KEEP_HOT": PLANTED},
            ["--poll-seconds", "-1"],
            [
                "error: FOUNDRY_STORE__KEEP_HOT (--store.keep-hot): Input should be a valid integer, "
                "unable to parse string as an integer",
                "error: FOUNDRY_STORE__REDIS_PASWORD (--store.redis-pasword): no such setting",
                "error: FOUNDRY_POLL_SECONDS (--poll-seconds): Input should be greater than 0",
            ],
        ),
        (
            STORE | {"FOUNDRY_TLS_KEY_FILE": PLANTED},
            [],
            [
                "error: tls_certificate_file, tls_key_file and tls_ca_file belong together: set all three or none",
            ],
        ),
        (
            STORE | {"FOUNDRY_ROLLOUT_ADDRESSES": PLANTED},
            [],
            ["error: FOUNDRY_ROLLOUT_ADDRESSES (--rollout-addresses): not valid JSON"],
        ),
        (
            STORE,
            ["--store.redis-pasword", PLANTED, f"--jobs.templat={PLANTED}"],
            ["error: --store.redis-pasword, --jobs.templat: no such option; --help lists them"],
        ),
        (STORE, ["--poll-seconds"], ["error: argument --poll-seconds: expected one argument"]),
        # Misspelt variables: an underscore too few, a letter too few.
        (
            STORE | {"FOUNDRY_STORE_REDIS_PASSWORD": PLANTED, "FOUNDRY_MAX_CHOICS": PLANTED},
            [],
            [
                "error: FOUNDRY_MAX_CHOICS: no such setting; FOUNDRY_MAX_CHOICES is one",
                "error: FOUNDRY_STORE_REDIS_PASSWORD: no such setting; FOUNDRY_STORE__REDIS_PASSWORD is one",
            ],
        ),
    ],
)
def test_each_fault_is_a_line(
    environment: dict[str, str],
    options: list[str],
    lines: list[str],
    refused: Callable[[Mapping[str, str], list[str]], list[str]],
) -> None:
    assert refused(environment, options) == lines


@pytest.mark.parametrize("service", SERVICES)
def test_variables_that_concern_others_are_left_alone(
    service: type[ServiceSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = "\n".join(
        path.read_text()
        for pattern in ("docker-compose.yml", "Makefile", "foundry/**/*.py", "examples/*.py", "tests/*.py")
        for path in ROOT.glob(pattern)
    )
    tools = set(re.findall(r"FOUNDRY_[A-Z0-9_]*[A-Z0-9]\b", pages))
    assert {"FOUNDRY_HOME", "FOUNDRY_CACHE", "FOUNDRY_GATEWAY", "FOUNDRY_TAG", "FOUNDRY_GRAFANA_PORT"} <= tools
    others = {variables.variable(path) for each in SERVICES for path in variables.paths(each)}
    for name in tools | others | SERVICE_LINKS.keys():
        monkeypatch.setenv(name, "x")
    assert list(variables.misspelt(service)) == []
    # And would be seen.
    monkeypatch.setenv("FOUNDRY_LOG_LEVL", "debug")
    assert list(variables.misspelt(service)) == ["FOUNDRY_LOG_LEVL: no such setting; FOUNDRY_LOG_LEVEL is one"]


def test_a_service_that_cannot_start_ends_without_a_traceback() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOUNDRY_")}
    environment |= {"FOUNDRY_MODEL": "/m", "FOUNDRY_MAX_SEQUENCS": "1", "FOUNDRY_STORE__OBJECTS_URL": "file:///x"}
    command = [sys.executable, "-m", "services.rollout.main"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: FOUNDRY_MAX_SEQUENCS: no such setting; FOUNDRY_MAX_SEQUENCES is one",
        "error: FOUNDRY_STORE__REDIS_URL (--store.redis-url): required",
    ]
