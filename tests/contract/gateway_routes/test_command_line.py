"""The command line against a gateway."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from foundry.cli.main import app
from foundry.local.home import Home
from foundry.store import CartridgeStore, RunState
from tests.contract.gateway_routes.site import DOCUMENT, Site, specification

Foundry = Callable[..., Result]


@pytest.fixture
def foundry(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Foundry:
    monkeypatch.setenv("FOUNDRY_GATEWAY", f"http://{site.gateway.address}/v1")
    monkeypatch.setenv("FOUNDRY_HOME", str(tmp_path))

    def run(*arguments: str, status: int = 0, input: str | None = None) -> Result:
        result = CliRunner().invoke(app, arguments, input=input)
        assert result.exit_code == status, result.output
        return result

    return run


def test_a_question_is_asked_from_standard_input(foundry: Foundry) -> None:
    asked = foundry("ask", "tiny", "Where?", "--max-tokens", "5")
    for arguments in (["tiny"], ["tiny", "-"]):
        piped = foundry("ask", *arguments, "--max-tokens", "5", input="Where?\n")
        assert (piped.stdout, piped.stderr) == (asked.stdout, asked.stderr)
    quiet = foundry("ask", "tiny", "Where?", "--max-tokens", "5", "-q")
    assert (quiet.stdout, quiet.stderr) == (asked.stdout, "")
    answer = json.loads(foundry("ask", "tiny", "Where?", "--max-tokens", "5", "--json").stdout)
    assert (answer["text"] + "\n", answer["completion_tokens"]) == (asked.stdout, 5)


def test_a_conversation_is_read_line_by_line(foundry: Foundry) -> None:
    said = foundry("chat", "tiny", "--max-tokens", "3", "--temperature", "0", "--json", input="One?\nTwo?\n").stdout
    one, two = (json.loads(line) for line in said.splitlines())
    # The second knows of the first.
    assert two["prompt_tokens"] > one["prompt_tokens"]


def test_what_a_table_prints_is_taken(site: Site, foundry: Foundry) -> None:
    (manifest,) = site.stack.publish("printed", site.stack.cartridge(11))
    digest = site.client.documents.create("A text that is printed.", title="Printed")["digest"]
    listed = foundry("cartridges", "versions", "printed").stdout.splitlines()[1].split()[-1]
    assert listed == manifest.digest
    assert listed in foundry("cartridges", "show", f"printed@{listed}").stdout
    row = next(line for line in foundry("documents", "ls").stdout.splitlines() if line.endswith("Printed"))
    assert row.split()[0] == digest
    assert "Printed" in foundry("documents", "show", digest).stdout
    assert foundry("documents", "show", digest, "--text").stdout == "A text that is printed."
    assert json.loads(foundry("documents", "rm", digest, "-y", "--json").stdout) == {"deleted": digest}
    assert "there is no document" in foundry("documents", "show", digest, status=3).stderr


def test_a_list_is_as_long_as_asked(site: Site, foundry: Foundry) -> None:
    for number in range(2):
        site.client.documents.create(f"Text {number} of two.")
    for group in ("documents", "runs", "cartridges"):
        assert len(json.loads(foundry(group, "ls", "--limit", "1", "--json").stdout)) <= 1
    assert len(foundry("documents", "ls", "--limit", "2").stdout.splitlines()) == 3


def test_a_run_is_paused_resumed_looked_at_and_cancelled(site: Site, foundry: Foundry) -> None:
    run_id = site.client.runs.create(**specification(text=DOCUMENT))["id"]
    assert f"{run_id} is paused" in foundry("runs", "pause", run_id).stderr
    assert json.loads(foundry("runs", "resume", run_id, "--json").stdout)["state"] == "queued"

    async def train(store: CartridgeStore) -> None:
        claimed = await store.runs.claim_run(run_id, "worker", 60.0, timeout_seconds=5)
        assert claimed is not None
        await store.runs.report(run_id, 1, {"type": "progress", "stage": "start", "done": 0, "total": 1})

    async def finish(store: CartridgeStore) -> None:
        await store.runs.finish(run_id, 1, RunState.FAILED, error="INTERNAL: it broke")

    site.stack.with_store(train)
    home = Home()
    home.create()
    home.log_file("trainer").write_text(f'{{"run": "{run_id}", "event": "claimed"}}\n{{"run": "run-other"}}\n')
    # The run goes on: what has happened so far, and the lines of its worker.
    shown = foundry("runs", "logs", run_id).stdout.splitlines()
    assert shown[-2:] == ["handbook: start 0/1", f'{{"run": "{run_id}", "event": "claimed"}}']
    events = [json.loads(line) for line in foundry("runs", "logs", run_id, "--json").stdout.splitlines()]
    states = ["queued", "paused", "queued", "running"]
    assert [event["state"] for event in events if event["type"] == "state"] == states
    assert [event["type"] for event in events[-2:]] == ["progress", "log"]
    site.stack.with_store(finish)
    followed = foundry("runs", "follow", run_id, "--json", status=1)
    assert [json.loads(line)["id"] for line in followed.stdout.splitlines()][: len(events) - 1] == [
        event["id"] for event in events[:-1]
    ]
    assert followed.stderr == f"error: {run_id} failed: INTERNAL: it broke\n"
    assert "has failed already" in foundry("runs", "pause", run_id, status=4).stderr
