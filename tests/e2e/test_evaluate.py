"""`foundry eval` on a cartridge that a run has trained: what it measures, what it says it did not, what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from foundry.cli.main import app
from foundry.client import FoundryClient
from foundry.evaluation.divergence import divergences
from foundry.evaluation.questions import Question
from foundry.model.template import ChatTemplate
from foundry.store import CartridgeStore, ManifestDraft
from tests.e2e.training import DOCUMENT, STEPS, create_run, spawn_trainer, start_servers, step_events
from tests.process import Process
from tests.services import Stack, open_stack, wait_ready, wait_serving
from tests.tiny import CLOCK, build_tiny_model

pytestmark = pytest.mark.timeout(180)
NAME, TOKENS, MAX_TOKENS = "handbook", 20, 8
WHOLE, CUT, UNTRAINED = "whole document", f"document cut to {TOKENS} tokens", "compact, untrained"
PROMPTS = ("What is open?", "When was the treaty signed?", "What is the price of grain?")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with open_stack(tmp_path_factory.mktemp("evaluate")) as stack:
        yield stack


@pytest.fixture(scope="module")
def gateway(stack: Stack) -> Process:
    """Before it a run has ended, which made `handbook`."""
    rollout, teacher = start_servers(stack)
    trainer = spawn_trainer(stack, rollout, teacher)
    gateway = stack.gateway([rollout])
    wait_serving(trainer)
    wait_ready(gateway)

    async def train(store: CartridgeStore) -> None:
        async for _ in step_events(store, await create_run(store, NAME, num_tokens=TOKENS)):
            pass

    stack.with_store(train)
    return gateway


@pytest.fixture
def environment(stack: Stack, gateway: Process, tmp_path: Path) -> dict[str, str]:
    """Of a machine on which no local stack runs, with the cluster's store."""
    return {
        "FOUNDRY_HOME": str(tmp_path / "home"),
        "FOUNDRY_GATEWAY": f"http://{gateway.address}",
        "FOUNDRY_STORE__REDIS_URL": stack.settings.redis_url.get_secret_value(),
        "FOUNDRY_STORE__OBJECTS_URL": stack.settings.objects_url,
    }


@pytest.fixture
def questions(gateway: Process, tmp_path: Path) -> Path:
    """The first expects what the model with the whole document says, the second what nobody says."""
    with FoundryClient(f"http://{gateway.address}") as client:
        messages = [{"role": "system", "content": DOCUMENT}, {"role": "user", "content": PROMPTS[0]}]
        said = client.chat(client.models()[0]["id"], messages, max_tokens=MAX_TOKENS, temperature=0.0).text
    expected = [{"expected": ["nobody", said]}, {"expected": ["nobody"]}, {}]
    rows = [{"prompt": prompt, **more} for prompt, more in zip(PROMPTS, expected, strict=True)]
    file = tmp_path / "ask.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def evaluate(environment: dict[str, str], *arguments: object) -> Result:
    options = ["--max-tokens", str(MAX_TOKENS), *map(str, arguments)]
    return CliRunner().invoke(app, ["eval", NAME, *options], env=environment)


def test_a_version_is_compared_with_its_document(
    stack: Stack, environment: dict[str, str], questions: Path, tmp_path: Path
) -> None:
    file = tmp_path / "result.json"
    command = [sys.executable, "-m", "foundry.cli.main", "eval", f"{NAME}@latest", "--questions", str(questions)]
    command += ["--max-tokens", str(MAX_TOKENS), "--model", str(stack.model), "--device", "cpu", "--output", str(file)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    version = f"{NAME}@{STEPS + 1}"
    systems: dict[str, Any] = {each["system"]: each for each in result["systems"]}
    assert list(systems) == ["no document", WHOLE, CUT, UNTRAINED, version]
    assert [systems[label]["model"] for label in (UNTRAINED, version)] == [f"{NAME}@1", version]
    assert result["left_out"] == []

    template = ChatTemplate(stack.lm.tokenizer, CLOCK)
    num_context = len(template.context(DOCUMENT))
    held = {label: each["held_tokens"] for label, each in systems.items()}
    # The cut's last token may be one that takes the place of two.
    assert 0 <= TOKENS - held.pop(CUT) <= 1
    assert held == {"no document": 0, WHOLE: num_context, UNTRAINED: TOKENS, version: TOKENS}

    for each in systems.values():
        assert each["num_expected"] == 2
        assert [answered["right"] for answered in each["questions"]][1:] == [False, None]
        assert each["first_token_seconds"] > 0
        assert (
            len({answered["kl"]["num_tokens"] for answered in each["questions"]} - set(range(1, MAX_TOKENS + 1))) == 0
        )
        assert each["kl"]["low"] <= each["kl"]["value"] <= each["kl"]["high"]
    assert systems[WHOLE]["num_right"] == 1
    assert systems[WHOLE]["right"]["value"] == 0.5
    assert abs(systems[WHOLE]["kl"]["value"]) < 1e-6
    assert systems["no document"]["kl"]["value"] > systems[version]["kl"]["value"] > 0.001
    # What was trained is what was measured: computed here once more, from the store's bytes.
    stored = stack.with_store(lambda store: store.fetch(result["cartridge"]["digest"]))
    asked = [Question([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    expected = list(divergences(stack.lm, template, DOCUMENT, [stored], asked, max_tokens=MAX_TOKENS))
    for (divergence,), answered in zip(expected, systems[version]["questions"], strict=True):
        assert answered["kl"]["kl_sum"] == pytest.approx(divergence.kl_sum, abs=1e-4)

    differences = {each["minus"]: each for each in result["differences"]}
    assert list(differences) == [WHOLE, UNTRAINED]
    for label, difference in differences.items():
        expected_difference = systems[version]["kl"]["value"] - systems[label]["kl"]["value"]
        assert difference["kl"]["value"] == pytest.approx(expected_difference)
        assert difference["right"]["low"] <= difference["right"]["value"] <= difference["right"]["high"]

    lines = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert "1 of 2 [0.000, 1.000]" in lines[WHOLE]
    assert " 0.000 [0.000, 0.000]" in lines[WHOLE]
    assert {*systems, f"{version} minus {WHOLE}", f"{version} minus {UNTRAINED}"} <= set(lines)
    assert f"Asking 3 questions: {CUT} ..." in done.stderr


@pytest.mark.parametrize(
    ("options", "changes", "why"),
    [
        (["--no-kl"], {}, "The KL is left out: --no-kl was given"),
        ([], {}, "The KL is left out: no local stack runs, so no model is known here: name its directory with --model"),
        (["--model", "{model}"], {"FOUNDRY_STORE__REDIS_URL": "", "FOUNDRY_STORE__OBJECTS_URL": ""}, "foundry up"),
    ],
)
def test_a_kl_that_is_not_measured_is_accounted_for(
    stack: Stack,
    environment: dict[str, str],
    questions: Path,
    tmp_path: Path,
    options: list[str],
    changes: dict[str, str],
    why: str,
) -> None:
    file = tmp_path / "result.json"
    options = [option.format(model=stack.model) for option in options]
    present = {name: value for name, value in (environment | changes).items() if value}
    done = evaluate(present, "--questions", questions, "--output", file, *options)
    assert done.exit_code == 0, done.output
    assert why in done.stderr
    result = json.loads(file.read_text())
    assert [line for line in result["left_out"] if why in line]
    assert [each["kl"] for each in result["systems"]] == [None] * 5
    assert {answered["kl"] for each in result["systems"] for answered in each["questions"]} == {None}
    rows = [line for line in done.stdout.splitlines() if "of 2" in line]
    assert len(rows) == 5
    assert all(row.rstrip().endswith(" -") for row in rows)


def test_questions_that_expect_nothing_make_no_share_of_right_answers(
    environment: dict[str, str], questions: Path
) -> None:
    questions.write_text('{"prompt": "What is open?"}')
    done = evaluate(environment, "--questions", questions, "--no-kl")
    assert done.exit_code == 0, done.output
    assert " of " not in done.stdout


def test_another_model_than_the_gateways_is_refused(
    environment: dict[str, str], questions: Path, tmp_path: Path
) -> None:
    other = build_tiny_model(tmp_path / "other", seed=1)
    done = subprocess.run(
        [sys.executable, "-m", "foundry.cli.main", "eval", NAME, "--questions", questions, "--model", other],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4
    assert "holds the model blake3:" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_there_is_not_is_left_out_or_refused(stack: Stack, environment: dict[str, str], questions: Path) -> None:
    async def publish(store: CartridgeStore, name: str, step: int, document: str | None, num_tokens: int) -> None:
        await store.acquire(name, f"run-{name}", 1)
        draft = ManifestDraft(name=name, run=f"run-{name}", attempt=1, step=step, document=document)
        await store.publish(stack.cartridge(step, num_tokens).to_bytes(), draft, durable=True)
        await store.release(name, f"run-{name}", 1)

    async def work(store: CartridgeStore) -> None:
        document = await store.documents.put(DOCUMENT)
        await publish(store, "start", 0, document, TOKENS)
        await publish(store, "orphan", 3, document, 2)
        await publish(store, "stranger", 3, None, TOKENS)

    stack.with_store(work)

    def run(name: str) -> Result:
        command = ["eval", name, "--questions", str(questions), "--max-tokens", "4", "--no-kl"]
        return CliRunner().invoke(app, command, env=environment)

    start = run("start")
    assert "version 1 is untrained itself" in start.stderr
    assert "start@1 minus whole document" in start.stdout
    assert "untrained" not in start.stdout
    orphan = run("orphan")
    assert "no version of step 0 is kept of run-orphan" in orphan.stderr
    # Shorter than the template's own tokens.
    assert "The document cut to 2 tokens is left out" in orphan.stderr
    assert run("stranger").stderr.startswith("error: stranger@1 names no document")
    assert run("absent").stderr.startswith("error: ")
