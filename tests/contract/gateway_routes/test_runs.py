"""Runs: queued, refused, followed, paused and cancelled."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from foundry.cli.main import app
from foundry.errors import (
    CartridgeTooLong,
    Conflict,
    DocumentNotFound,
    DocumentTooLong,
    DocumentUnreadable,
    FingerprintMismatch,
    InvalidArgument,
    RunNotFound,
)
from foundry.identity import content_digest
from foundry.model.template import ChatTemplate
from foundry.recipes import choose, describe
from foundry.store import (
    CartridgeStore,
    DocumentPrompts,
    Resources,
    RunRecord,
    RunRequest,
    RunState,
    SelfStudyPrompts,
)
from tests.contract.gateway_routes.site import DOCUMENT, Site, specification
from tests.tiny import CLOCK, build_tokenizer


def test_a_run_is_queued_with_its_document(site: Site) -> None:
    created: dict[str, Any] = {**site.client.runs.create(**specification(text=DOCUMENT, title="Inline"))}
    num_tokens = len(ChatTemplate(build_tokenizer(), CLOCK).context(DOCUMENT))
    asked = RunRequest(document=content_digest(DOCUMENT.encode()), **specification())
    whole = choose(asked, num_tokens)
    assert created.pop("chosen") == describe(whole, "standard", num_tokens)
    assert created | {"chosen": None} == {
        "object": "run",
        "id": created["id"],
        "spec": json.loads(whole.to_json()),
        "state": "queued",
        "attempt": 0,
        "desired": "continue",
        "worker": "",
        "waiting_for": "",
        "created_at": created["created_at"],
        **dict.fromkeys(("started_at", "finished_at", "error", "result", "last_event", "job", "chosen")),
    }
    assert created["spec"]["document"] == content_digest(DOCUMENT.encode())
    assert site.client.documents.text(created["spec"]["document"]) == DOCUMENT
    assert site.client.runs.get(created["id"]) == created | {"chosen": None}
    again = site.client.runs.create(**specification(document=created["spec"]["document"]))
    assert [run["id"] for run in site.client.runs.list()][:2] == [again["id"], created["id"]]
    for run in (created, again):
        assert site.client.runs.cancel(run["id"])["state"] == "cancelled"


@pytest.mark.parametrize(
    ("changes", "kind", "field"),
    [
        ({"text": DOCUMENT, "num_tokens": 0}, InvalidArgument, "num_tokens"),
        ({"text": DOCUMENT, "objective": "mse"}, InvalidArgument, "objective"),
        ({"text": DOCUMENT, "learning_rat": 1}, InvalidArgument, "learning_rat"),
        ({"text": DOCUMENT, "name": "Not A Name"}, InvalidArgument, "name"),
        ({"text": DOCUMENT, "prompts": {"kind": "oracle"}}, InvalidArgument, "prompts.kind"),
        ({"text": DOCUMENT, "document": "blake3:" + "0" * 64}, InvalidArgument, "text"),
        ({"text": 5}, InvalidArgument, "text"),
        ({"text": DOCUMENT, "resources": {"gpus": 1}}, InvalidArgument, "resources"),
        ({}, InvalidArgument, "document"),
        ({"document": "blake3:" + "0" * 64}, DocumentNotFound, "document"),
        ({"text": ""}, DocumentUnreadable, "text"),
        (
            {"text": DOCUMENT, "prompts": {"kind": "document", "digest": "blake3:" + "1" * 64}},
            DocumentNotFound,
            "prompts.digest",
        ),
        ({"text": DOCUMENT, "model_fingerprint": "blake3:" + "2" * 64}, FingerprintMismatch, "model_fingerprint"),
        ({"text": DOCUMENT, "max_new_tokens": 5000}, InvalidArgument, "max_new_tokens"),
        ({"text": "Short text.", "num_tokens": 64}, CartridgeTooLong, "num_tokens"),
        ({"text": "x" * 2000}, DocumentTooLong, "text"),
        ({"text": DOCUMENT, "title": "x" * 301}, InvalidArgument, "title"),
        ({"text": DOCUMENT, "more_documents": ["blake3:" + "0" * 64]}, DocumentNotFound, "more_documents"),
    ],
)
def test_an_impossible_run_is_refused_at_once(
    site: Site, changes: dict[str, Any], kind: type[Exception], field: str
) -> None:
    before = len(site.client.runs.list())
    with pytest.raises(kind) as raised:
        site.client.runs.create(**specification(**changes))
    assert raised.type is kind
    assert getattr(raised.value, "field", None) == field
    assert len(site.client.runs.list()) == before


def test_a_file_of_prompts_is_read_at_once(site: Site) -> None:
    digest = site.client.documents.create('{"prompt": "What was signed?"}\n{"question": "When?"}')["digest"]
    for name in ("prompts", "heldout"):
        with pytest.raises(InvalidArgument, match=f"{name}, line 2") as raised:
            site.client.runs.create(**specification(text=DOCUMENT, **{name: {"kind": "document", "digest": digest}}))
        assert raised.value.field == name


def test_openapi_says_what_a_run_takes_and_answers(site: Site) -> None:
    schemas = site.http("GET", "/openapi.json").json()["components"]["schemas"]
    of_runs = {"RunCard": RunRecord} | {
        model.__name__: model for model in (RunRequest, SelfStudyPrompts, DocumentPrompts, Resources)
    }
    for title, model in of_runs.items():
        for name, field in model.model_fields.items():
            shown = schemas[title]["properties"][field.serialization_alias or name]
            assert field.description, (title, name)
            assert shown["description"] == field.description, (title, name)
    temperature = schemas["RunRequest"]["properties"]["temperature"]
    assert (temperature["default"], temperature["exclusiveMinimum"], temperature["maximum"]) == (1.0, 0, 10)
    # What follows from the document has no default.
    assert "default" not in schemas["RunRequest"]["properties"]["num_tokens"]
    assert schemas["RunRequest"]["required"] == ["name"]


def test_the_command_uploads_what_it_names_and_asks_for_the_run_that_it_prints(site: Site, tmp_path: Path) -> None:
    (tmp_path / "treaty.md").write_text(f"{DOCUMENT}Twice.")
    (tmp_path / "ask.jsonl").write_text('{"prompt": "What was signed?"}')
    (tmp_path / "run.yaml").write_text("name: handbook\ndocument: treaty.md\nnum_tokens: 16\nheldout: ask.jsonl")

    def train(*options: str) -> str:
        arguments = ["train", "--config", str(tmp_path / "run.yaml"), "--max-new-tokens", "8", *options]
        result = CliRunner().invoke(app, arguments, env={"FOUNDRY_GATEWAY": f"http://{site.gateway.address}"})
        assert result.exit_code == 0, result.output
        return result.stdout

    before = len(site.client.runs.list())
    printed = yaml.safe_load(train("--dry-run"))
    assert len(site.client.runs.list()) == before
    run = site.client.runs.get(train("--detach").strip())
    assert run["spec"].items() >= printed.items()
    assert site.client.documents.get(printed["document"])["title"] == "treaty.md"
    assert site.client.documents.get(printed["heldout"]["digest"])["title"] == "heldout of handbook"
    site.client.runs.cancel(run["id"])


def test_events_follow_a_run_to_its_end_and_can_be_resumed(site: Site) -> None:
    run_id = site.client.runs.create(**specification(text=DOCUMENT))["id"]
    events = site.client.runs.events(run_id)
    queued = next(events)
    assert (queued["type"], queued["state"]) == ("state", "queued")

    async def work(store: CartridgeStore) -> None:
        claimed = await store.runs.claim("worker", 60.0, timeout_seconds=5)
        assert claimed is not None
        assert claimed.run_id == run_id
        await store.runs.report(run_id, claimed.attempt, {"type": "step", "step": 1, "loss": 0.5})
        await store.runs.report(run_id, claimed.attempt, {"type": "step", "step": 2, "note": "\u2028é"})

    site.stack.with_store(work)
    # The stream was open before any of this was reported.
    running, one, two = islice(events, 3)
    assert (running["state"], one["step"], one["loss"], dict(two)["note"]) == ("running", 1, 0.5, "\u2028é")
    assert site.client.runs.get(run_id)["last_event"] == {"type": "step", "step": 2, "note": "\u2028é"}
    so_far = [event["id"] for event in site.client.runs.events(run_id, follow=False)]
    assert so_far == [event["id"] for event in (queued, running, one, two)]

    async def finish(store: CartridgeStore) -> None:
        await store.runs.finish(run_id, 1, RunState.SUCCEEDED, result={"version": 2})

    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(site.client.runs.wait, run_id)
        site.stack.with_store(finish)
        assert waiting.result(timeout=30)["state"] == "succeeded"
    finished = list(events)
    assert [(event["type"], event["state"], event["result"]) for event in finished] == [
        ("finished", "succeeded", {"version": 2})
    ]
    resumed = list(site.client.runs.events(run_id, after=one["id"]))
    assert [event["id"] for event in resumed] == [two["id"], finished[0]["id"]]


def test_the_event_stream_is_server_sent_events(site: Site) -> None:
    run_id = site.client.runs.create(**specification(text=DOCUMENT))["id"]
    site.client.runs.cancel(run_id)
    answer = site.http("GET", f"/v1/runs/{run_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [dict(line.split(": ", 1) for line in block.split("\n")) for block in answer.text.strip().split("\n\n")]
    assert all(set(block) == {"id", "data"} for block in blocks)
    assert json.loads(blocks[-1]["data"])["state"] == "cancelled"
    later = site.http("GET", f"/v1/runs/{run_id}/events", headers={"last-event-id": blocks[-2]["id"]})
    assert later.text.strip().split("\n\n") == [answer.text.strip().split("\n\n")[-1]]
    ended = site.http("GET", f"/v1/runs/{run_id}/events", headers={"last-event-id": blocks[-1]["id"]})
    assert (ended.status_code, ended.content) == (204, b"")
    assert list(site.client.runs.events(run_id, after=blocks[-1]["id"])) == []
    for path, headers, status in (
        (f"/v1/runs/{run_id}/events", {"last-event-id": "yesterday"}, 400),
        ("/v1/runs/run-aaaaaaaa/events", {}, 404),
    ):
        refused = site.http("GET", path, headers=headers)
        assert (refused.status_code, refused.json()["error"]["type"]) == (status, "invalid_request_error")


def test_runs_are_paused_resumed_and_cancelled(site: Site) -> None:
    runs = site.client.runs
    run_id = runs.create(**specification(text=DOCUMENT))["id"]
    assert runs.pause(run_id)["state"] == "paused"
    assert runs.resume(run_id)["state"] == "queued"
    assert runs.cancel(run_id)["state"] == "cancelled"
    with pytest.raises(Conflict):
        runs.pause(run_id)
    for unknown in (runs.get, runs.cancel, runs.pause, runs.resume):
        with pytest.raises(RunNotFound):
            unknown("run-aaaaaaaa")


def test_a_run_is_deleted_once_it_is_over(site: Site) -> None:
    runs = site.client.runs
    run_id = runs.create(**specification(text=DOCUMENT))["id"]
    refused = site.http("DELETE", f"/v1/runs/{run_id}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "CONFLICT")
    runs.cancel(run_id)
    runs.delete(run_id)
    for gone in (runs.get, runs.delete, runs.wait):
        with pytest.raises(RunNotFound):
            gone(run_id)
    assert run_id not in [run["id"] for run in runs.list()]
