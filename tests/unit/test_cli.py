"""The command line: quick, plain errors, and a doctor that finds what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from foundry.cli import doctor
from foundry.cli.main import app

HELP_SECONDS = 0.5


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOUNDRY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FOUNDRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FOUNDRY_GATEWAY", raising=False)
    for variable in [name for name in os.environ if name.startswith("FOUNDRY_STORE__")]:
        monkeypatch.delenv(variable)


def foundry(*arguments: str, environment: Mapping[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, arguments, env=environment)


def refused(*arguments: str) -> str:
    """Standard error of a command that must fail: one line, no traceback."""
    result = foundry(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stdout == ""
    return result.stderr


def test_help_is_quick() -> None:
    # CPU time, the best of three: what else this machine does is no fault of the command.
    def seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-m", "foundry.cli.main", "--help"], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < HELP_SECONDS


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom foundry.cli.main import app\napp(['--help'], standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers', 'httpx', 'grpc', 'redis', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_every_command() -> None:
    listed = foundry("--help").stdout
    commands = ("up", "down", "status", "train", "runs", "chat", "ask", "cartridges", "gc", "store", "size", "doctor")
    for command in commands:
        assert f"\n  {command} " in listed


@pytest.mark.parametrize(
    "arguments",
    [
        ["runs", "ls"],
        ["runs", "show", "run-1"],
        ["cartridges", "ls"],
        ["cartridges", "rm", "handbook"],
        ["gc", "--dry-run"],
        ["store", "verify"],
        ["store", "rebuild"],
    ],
)
def test_commands_that_need_the_stack_say_how_to_start_it(arguments: list[str]) -> None:
    assert "foundry up" in refused(*arguments)


def test_status_without_a_stack() -> None:
    result = foundry("status", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["running"] is False


def test_down_without_a_stack_is_no_error() -> None:
    result = foundry("down")
    assert result.exit_code == 0
    assert "No stack was running" in result.stderr


def test_missing_document_is_found_before_anything_starts(tmp_path: Path) -> None:
    assert "nowhere.md can't be read" in refused("train", str(tmp_path / "nowhere.md"), "--name", "x")


def test_unknown_model_is_refused() -> None:
    assert "neither a directory nor a hub id" in refused("up", "--model", "no such model")


def test_version_to_remove_must_be_a_number() -> None:
    assert "names no version" in refused("cartridges", "rm", "handbook@latest")


def test_gateway_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOUNDRY_GATEWAY", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9" in refused("runs", "ls")


def test_store_settings_that_are_wrong_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOUNDRY_STORE__REDIS_URL", "redis://127.0.0.1:1")
    assert "FOUNDRY_STORE__OBJECTS_URL: required" in refused("gc")
    monkeypatch.setenv("FOUNDRY_STORE__OBJECTS_URL", "file:///nowhere")
    monkeypatch.setenv("FOUNDRY_STORE__KEEP_DURABLE", "0")
    assert "FOUNDRY_STORE__KEEP_DURABLE: Input should be greater" in refused("store", "verify")
    monkeypatch.setenv("FOUNDRY_STORE_KEEP_HOT", "2")
    assert "FOUNDRY_STORE__KEEP_HOT is one" in refused("gc")


def test_doctor_is_content_here() -> None:
    result = foundry("doctor", "--json")
    findings = {finding["what"]: finding for finding in json.loads(result.stdout)}
    assert findings["torch"]["state"] == "ok"
    assert findings["valkey"]["state"] == "ok"
    missing = [what for what, finding in findings.items() if finding["state"] == "missing"]
    assert result.exit_code == (1 if missing else 0)
    # Whatever this machine lacks, it is not what the installation brings.
    assert set(missing) <= {"memory", "disk for cartridges", "disk for models"}


def test_doctor_fails_when_something_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    result = foundry("doctor")
    assert result.exit_code == 1
    assert "MISSING   torch: ModuleNotFoundError: No module named 'torch'" in result.stdout
    assert "-> pip install 'cartridge-foundry[local]'" in result.stdout


def test_doctor_knows_too_little_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_DISK_GB", 1e9)
    findings = [finding for finding in doctor._disk() if finding.state == "missing"]
    assert {finding.what for finding in findings} == {"disk for cartridges", "disk for models"}
    assert all("FOUNDRY_" in finding.remedy for finding in findings)


def test_size_prints_what_a_workload_takes() -> None:
    result = foundry("size", "llama-3.2-3b", "--runs", "2", "--engine", "vllm")
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert "234.9 MB" in rows["cartridge"]
    assert {"rollout", "teacher", "trainer"} <= rows.keys()
    assert "An estimate before measuring" in result.stdout


def test_size_takes_a_directory_and_prints_json(tmp_path: Path) -> None:
    config = {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "vocab_size": 384,
        "dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    values = json.loads(foundry("size", str(tmp_path), "--gpu", "l4", "--documents", "7", "--json").stdout)
    assert values["sizing"]["model"]["num_kv_heads"] == 4
    assert values["sizing"]["gpu"]["memory_gb"] == 24
    assert values["sizes"]["kv_bytes_per_token"] == 2 * 3 * 64 * 4
    assert values["sizes"]["redis_bytes"] == 7 * 4 * values["sizes"]["cartridge_bytes"]
    assert values["gpus"] == values["services"]["rollout"]["gpus"] == 1
    assert values["assumptions"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such-model"], "nothing is fetched"),
        (["no such model"], "nothing is fetched"),
        (["llama-3.2-3b", "--gpu", "b9000"], "not one of a100-80, h100-80"),
        (["llama-3.2-3b", "--engine", "abacus"], "not one of torch, vllm"),
        (["qwen2.5-32b", "--gpu", "l40s"], "does not fit"),
    ],
)
def test_size_refuses_what_it_cannot_reckon(arguments: list[str], message: str) -> None:
    assert message in refused("size", *arguments)
