"""The command line: quick, plain errors, and a doctor that finds what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner, Result

from foundry.cli import doctor
from foundry.cli.main import app
from foundry.cli.terminal import FAILED, INTERRUPTED, STATUSES, print_table, status_of
from foundry.errors import BY_REASON
from foundry.identity import content_digest
from foundry.local.demo_model import DEMO_NAME
from foundry.store import RunRequest

HELP_SECONDS = 0.5


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOUNDRY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FOUNDRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FOUNDRY_GATEWAY", raising=False)
    monkeypatch.delenv("FOUNDRY_API_KEY", raising=False)
    for variable in [name for name in os.environ if name.startswith("FOUNDRY_STORE__")]:
        monkeypatch.delenv(variable)


def foundry(*arguments: str, environment: Mapping[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, arguments, env=environment)


def refused(*arguments: str, status: int = 2) -> str:
    """Standard error of a command that must fail: one line, no traceback."""
    result = foundry(*arguments)
    assert result.exit_code == status, result.output
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


def test_missing_document_is_found_before_anything_starts(tmp_path: Path) -> None:
    assert "nowhere.md can't be read" in refused("train", str(tmp_path / "nowhere.md"), "--name", "x")


@pytest.fixture
def document(tmp_path: Path) -> Path:
    """With a file of prompts beside it."""
    (tmp_path / "ask.jsonl").write_text('{"prompt": "What is open?"}\n{"prompt": "Who signed?"}\n')
    file = tmp_path / "handbook.md"
    file.write_text("The harbour is open again. The treaty was signed in the spring. " * 4)
    return file


def resolved(*arguments: object) -> Any:
    result = foundry("train", *map(str, arguments), "--dry-run")
    assert result.exit_code == 0, result.output
    return yaml.safe_load(result.stdout)


def test_what_is_not_given_is_left_to_the_recipe(document: Path) -> None:
    """A document's length is known to the gateway, and here only where the tokenizer is."""
    digest = content_digest(document.read_bytes())
    assert resolved(document, "--name", "x") == {"name": "x", "document": digest}
    asked = {"name": "x", "document": digest, "recipe": "quick", "compression": 8}
    assert resolved(document, "--name", "x", "--recipe", "quick", "--compression", "8") == asked


def test_several_documents_are_of_one_run(document: Path) -> None:
    others = [document.with_name(f"other-{number}.md") for number in range(2)]
    for number, other in enumerate(others):
        other.write_text(f"Another text, number {number}.")
    found = resolved(document, *others, "--name", "x")
    assert found["document"] == content_digest(document.read_bytes())
    assert found["more_documents"] == [content_digest(other.read_bytes()) for other in others]
    assert "other-9.md can't be read" in refused(
        "train", str(document), str(document.with_name("other-9.md")), "--name", "x"
    )


def test_every_value_of_a_run_is_an_option(document: Path) -> None:
    values = {
        "name": "acme/x",
        "num_tokens": 16,
        "more_documents": ["blake3:" + "1" * 64, "blake3:" + "2" * 64],
        "init": "version",
        "init_version": "acme/y@3",
        "reference_tokens": 100,
        "matching_steps": 101,
        "hard_label_weight": 0.5,
        "mode": "hybrid",
        "off_policy_share": 0.25,
        "general_share": 0.125,
        "schedule": "cosine",
        "warmup_steps": 2,
        "max_grad_norm": 1.5,
        "patience": 3,
        "recipe": "thorough",
        "num_frozen": 2,
        "num_steps": 3,
        "batch_size": 4,
        "samples_per_prompt": 2,
        "max_new_tokens": 5,
        "temperature": 0.5,
        "objective": "jsd",
        "jsd_beta": 0.25,
        "topk": 6,
        "learning_rate": 1e-5,
        "seed": 7,
        "heldout_every": 0,
        "durable_every": 8,
        "checkpoint_every": 9,
        "policy_mismatch_threshold": 0.5,
        "max_staleness": 2,
        "importance_ratio_max": 4.0,
        "model_fingerprint": "blake3:" + "0" * 64,
    }
    parts: dict[str, dict[str, Any]] = {
        "prompts": {"num_prompts": 10, "max_prompt_tokens": 11},
        "heldout": {"heldout_num_prompts": 12, "heldout_max_prompt_tokens": 13},
        "resources": {"cpu": "4", "memory": "16Gi", "gpus": 1, "nodes": 2},
    }
    flat = values | {name: value for part in parts.values() for name, value in part.items()}
    written = {name: ",".join(value) if isinstance(value, list) else str(value) for name, value in flat.items()}
    options = [word for name, value in written.items() for word in (f"--{name.replace('_', '-')}", value)]
    found = resolved(document, *options, "--families", "cloze,summary")
    # But for those of `init_text`, which goes with another start, and `compression`, which with no length.
    assert set(found) == set(RunRequest.model_fields) - {"init_text", "compression", "text", "title"}
    assert found["families"] == ["cloze", "summary"]
    assert {name: found[name] for name in values} == values
    assert found["prompts"] == {"kind": "selfstudy", **parts["prompts"]}
    assert found["heldout"] == {"kind": "selfstudy", "num_prompts": 12, "max_prompt_tokens": 13}
    assert found["resources"] == parts["resources"]


def test_short_spellings_and_files(document: Path) -> None:
    prompts = document.with_name("ask.jsonl")
    options = ("--tokens", 20, "--steps", 2, "--lr", 0.5, "--prompts", prompts, "--heldout", prompts)
    found = resolved(document, "--name", "x", *options)
    assert (found["num_tokens"], found["num_steps"], found["learning_rate"]) == (20, 2, 0.5)
    in_a_file = {"kind": "document", "digest": content_digest(prompts.read_bytes())}
    assert (found["prompts"], found["heldout"]) == (in_a_file, in_a_file)


@pytest.mark.parametrize("written", [yaml.safe_dump, json.dumps])
def test_a_configuration_file_has_the_keys_of_the_api(document: Path, written: Callable[[Any], str]) -> None:
    config = document.with_name("run.json" if written is json.dumps else "run.yaml")
    values = {"name": "x", "document": "handbook.md", "num_tokens": 20, "learning_rate": 2e-05, "heldout": "ask.jsonl"}
    config.write_text(written(values | {"prompts": {"kind": "selfstudy", "num_prompts": 5, "max_prompt_tokens": 6}}))
    found = resolved("--config", config, "--tokens", 30, "--num-prompts", 7)
    assert (found["name"], found["num_tokens"], found["learning_rate"]) == ("x", 30, 2e-05)
    assert found["document"] == content_digest(document.read_bytes())
    assert found["prompts"] == {"kind": "selfstudy", "num_prompts": 7, "max_prompt_tokens": 6}
    assert found["heldout"]["digest"] == content_digest(document.with_name("ask.jsonl").read_bytes())
    other = document.with_name("other.md")
    other.write_text("Another text, which is long enough.")
    assert resolved(other, "--config", config)["document"] == content_digest(other.read_bytes())
    # What a dry run prints is a configuration too.
    again = document.with_name("again.yaml")
    again.write_text(yaml.safe_dump(found))
    assert resolved("--config", again) == found


def test_numbers_may_be_written_without_a_point(document: Path) -> None:
    config = document.with_name("run.yaml")
    config.write_text("name: x\nlearning_rate: 1e-5\n")
    assert resolved(document, "--config", config)["learning_rate"] == 1e-5


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ([], "", "name is missing"),
        (["--name", "Not A Name"], "", "not a cartridge name"),
        (["--name", "x", "--tokens", "1"], "", "num_frozen is 1 of 1 tokens"),
        (["--name", "x", "--steps", "-1"], "", "--steps must be greater"),
        (["--name", "x", "--lr", "nan"], "", "--lr must be a finite number"),
        (["--name", "x", "--objective", "mse"], "", "'forward_kl', 'reverse_kl', 'jsd', 'topk' or 'nll'"),
        (["--name", "x", "--tokens", "5000"], "", "a cartridge of 5000 tokens"),
        (["--name", "x", "--prompts", "{here}/handbook.md"], "", "handbook.md, line 1 is not JSON"),
        (["--name", "x", "--heldout", "{here}/absent.jsonl"], "", "absent.jsonl can't be read"),
        ([], "name: x\nlearning_rat: 1", "unknown parameter 'learning_rat'"),
        ([], "name: x\nprompts: {kind: selfstudy, num_prompts: many}", "prompts.num_prompts must be a valid integer"),
        ([], "name: x\nheldout: absent.jsonl", "absent.jsonl can't be read"),
        ([], "name: x\nseed: [", "is neither YAML nor JSON"),
        ([], "- name", "holds no keys"),
    ],
)
def test_what_is_wrong_with_a_run_is_found_before_anything_starts(
    document: Path, options: list[str], config: str, message: str
) -> None:
    if config:
        document.with_name("run.yaml").write_text(config)
        options = ["--config", "{here}/run.yaml"]
    options = [option.format(here=document.parent) for option in options]
    assert message in refused("train", str(document), *options)


def test_a_cartridge_is_measured_by_a_tokenizer_that_is_here(document: Path, tmp_path: Path) -> None:
    """The model that a stack would be started with."""
    words = Tokenizer(models.WordLevel({"harbour": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    directory = tmp_path / "cache" / "models" / DEMO_NAME
    directory.mkdir(parents=True)
    words.save(str(directory / "tokenizer.json"))
    document.write_text("harbour " * 200)
    assert resolved(document, "--name", "x", "--tokens", "300")["num_tokens"] == 300
    assert "the document has only" in refused("train", str(document), "--name", "x", "--tokens", "1800")


def test_questions_are_read_before_anything_starts(document: Path) -> None:
    assert "handbook.md, line 1 is not JSON" in refused("eval", "x", "--questions", str(document))
    questions = document.with_name("ask.jsonl")
    result = document.with_name("absent") / "result.json"
    assert "there is no directory" in refused("eval", "x", "--questions", str(questions), "--output", str(result))


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


def test_a_document_may_come_on_standard_input() -> None:
    text = "The harbour is open again. " * 8
    result = CliRunner().invoke(app, ["train", "-", "--name", "x", "--dry-run", "--json"], input=text)
    assert json.loads(result.stdout) == {"name": "x", "document": content_digest(text.encode())}


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
