"""`foundry train`: what becomes of its options, and what is found before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from foundry.cli.main import app
from foundry.identity import content_digest
from foundry.local.demo_model import DEMO_NAME
from foundry.store import RunRequest
from tests.unit.cli.command import foundry, refused


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


def test_a_document_may_come_on_standard_input() -> None:
    text = "The harbour is open again. " * 8
    result = CliRunner().invoke(app, ["train", "-", "--name", "x", "--dry-run", "--json"], input=text)
    assert json.loads(result.stdout) == {"name": "x", "document": content_digest(text.encode())}
