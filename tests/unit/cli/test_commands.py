"""The command line: quick, plain errors, and a doctor that finds what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from foundry.cli import doctor
from foundry.cli.terminal import FAILED, INTERRUPTED, STATUSES, print_table, status_of
from foundry.errors import BY_REASON
from tests.unit.cli.command import foundry, refused

HELP_SECONDS = 0.5


def test_help_is_quick() -> None:
    # CPU time, the best of three: what else this machine does is no fault of the command, nor is being measured.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}

    def seconds() -> float:
        before = os.times()
        command = [sys.executable, "-m", "foundry.cli.main", "--help"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
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
    commands = "up down status train runs chat ask cartridges documents eval gc store keys size doctor"
    for command in commands.split():
        assert f"\n  {command} " in listed


@pytest.mark.parametrize(
    "arguments",
    [
        ["runs", "ls"],
        ["runs", "show", "run-1"],
        ["cartridges", "ls"],
        ["cartridges", "rm", "handbook"],
        ["runs", "rm", "run-1"],
        ["documents", "ls"],
        ["documents", "rm", "blake3:0"],
        ["gc", "--dry-run"],
        ["store", "verify"],
        ["store", "rebuild"],
        ["keys", "list"],
    ],
)
def test_commands_that_need_the_stack_say_how_to_start_it(arguments: list[str]) -> None:
    assert "foundry up" in refused(*arguments, status=6)


def test_status_without_a_stack() -> None:
    result = foundry("status", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["running"] is False


def test_down_without_a_stack_is_no_error() -> None:
    result = foundry("down")
    assert result.exit_code == 0
    assert "No stack was running" in result.stderr


@pytest.mark.parametrize("path", ["/proc/foundry", "{file}/below", "{file}", "{file}" + 300 * "x"])
def test_a_home_that_cannot_be_made_is_one_plain_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str
) -> None:
    """On a file system that takes nothing, not even from root; below a file; with a name that is too long."""
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("FOUNDRY_HOME", path.format(file=file))
    assert "FOUNDRY_HOME must be a directory that can be written" in refused("up", status=1)
    for command in ("down", "status"):
        result = foundry(command)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert result.stderr.count("\n") == 1


def test_unknown_model_is_refused() -> None:
    assert "neither a directory nor a hub id" in refused("up", "--model", "no such model", status=3)


def test_version_to_remove_must_be_a_number() -> None:
    assert "names no version" in refused("cartridges", "rm", "handbook@latest")


def test_gateway_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOUNDRY_GATEWAY", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9" in refused("runs", "ls", status=6)


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


@pytest.mark.parametrize("path", ["/proc/foundry", "{file}/below", "{file}"])
def test_doctor_knows_where_no_home_can_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FOUNDRY_HOME", path.format(file=tmp_path / "file"))
    found = {finding.what: finding.state for finding in doctor._disk()}
    assert found["disk for cartridges"] == "missing"


def program(*arguments: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
    """In a process of its own, with real files for its standard input and output."""
    command = [sys.executable, "-m", "foundry", *arguments]
    return subprocess.run(command, check=False, timeout=60, **{"stderr": subprocess.PIPE, **more})


@pytest.mark.parametrize("arguments", [["--help"], ["size", "llama-3.2-3b"]])
def test_a_full_disk_is_one_plain_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = program(*arguments, stdout=full)
    assert (done.returncode, done.stderr) == (1, b"error: can't write: No space left on device\n")


@pytest.mark.parametrize("arguments", [["--help"], ["size", "llama-3.2-3b"]])
def test_a_reader_that_has_enough_is_no_error(arguments: list[str]) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as pipe:
        done = program(*arguments, stdout=pipe)
    assert (done.returncode, done.stderr) == (1, b"")


def test_the_module_is_the_command() -> None:
    assert program("--version", stdout=subprocess.PIPE).stdout == foundry("--version").stdout.encode()
    assert foundry("--version").stdout == f"foundry {version('cartridge-foundry')}\n"


@pytest.mark.parametrize("arguments", [["-h"], ["runs", "-h"], ["train", "-h"], ["cartridges", "tag", "-h"]])
def test_help_has_a_short_spelling(arguments: list[str]) -> None:
    assert foundry(*arguments).stdout == foundry(*arguments[:-1], "--help").stdout != ""


@pytest.mark.parametrize(
    ("words", "found"),
    [("foundry ru", "runs"), ("foundry runs pa", "pause"), ("foundry train --learn", "--learning-rate")],
)
def test_the_shell_completes_commands_and_options(words: str, found: str) -> None:
    environment = {"_FOUNDRY_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert foundry(environment=environment).stdout.split() == [found]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["nothing"], 2, "error: No such command 'nothing' (see 'foundry --help')"),
        (["runs", "show"], 2, "error: Missing argument 'run_id' (see 'foundry runs show --help')"),
        (["train", "--nothing"], 2, "error: No such option: --nothing"),
        (["size", "llama-3.2-3b", "--gpu", "b9000"], 2, "error: --gpu 'b9000' is not one of"),
        (["ask", "x", "Why?", "--temperature", "nan"], 2, "error: Invalid value for '--temperature'"),
        (["runs", "ls", "--limit", "0"], 2, "error: Invalid value for '--limit'"),
        (["eval", "x", "--questions", "/proc/absent"], 2, "error: /proc/absent can't be read"),
    ],
)
def test_every_error_has_one_form(arguments: list[str], status: int, said: str) -> None:
    assert refused(*arguments, status=status).startswith(said)


def test_every_kind_of_error_has_a_status() -> None:
    statuses = {error.reason: status_of(error("")) for error in BY_REASON.values()}
    of_each = ("INVALID_ARGUMENT", "RUN_NOT_FOUND", "CONFLICT", "PERMISSION_DENIED", "STORE_UNAVAILABLE", "INTERNAL")
    assert [statuses[reason] for reason in of_each] == [2, 3, 4, 5, 6, 1]
    assert len({status for status, *_ in STATUSES} | {0, FAILED, INTERRUPTED}) == len(STATUSES) + 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ask", "x"], b"error: the question on standard input is not text in UTF-8"),
        (["ask", "x", "-"], b"error: the question on standard input is not text in UTF-8"),
        (["train", "-", "--name", "x"], b"error: -: the document is not UTF-8 text"),
        (["runs", "show", b"\xff"], b"error: '\\udcff' is not a run id"),
        (["ask", "x", b"\xff"], b"error: messages can't be sent as JSON"),
        (["train", b"/proc/\xff", "--name", "x"], b"error: /proc/\\udcff can't be read"),
    ],
)
def test_what_is_no_text_is_one_plain_line(monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: bytes) -> None:
    monkeypatch.setenv("FOUNDRY_GATEWAY", "http://127.0.0.1:9")
    done = program(*arguments, input=b"\xff\n", stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(said), done.stderr
    assert done.stderr.count(b"\n") == 1


def test_an_address_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOUNDRY_GATEWAY", "127.0.0.1:8000")
    assert refused("runs", "ls").startswith("error: FOUNDRY_GATEWAY: '127.0.0.1:8000' is not")


def test_tables_shorten_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    title = "a title \x1b]0;that moves the cursor\x07 " + "and is long " * 50
    print_table(["digest", "title"], [["blake3:" + "0" * 64, title], ["", "東京"]], empty="")
    head, row, last = capsys.readouterr().out.splitlines()
    assert row.startswith("blake3:" + "0" * 64 + "  a title �]0;")
    assert row.endswith("and is long")
    assert head.index("title") == row.index("a title") == last.index("東京")


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
    assert message in refused("size", *arguments, status=3 if message == "nothing is fetched" else 2)
