"""Trackers: everything is written, in order, and nothing that goes wrong with one reaches the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from foundry.errors import ExtraMissing
from foundry.store import ClaimedRun, Desired
from services.trainer.settings import TrainerSettings
from services.trainer.trackers import tracker
from services.trainer.trackers.choice import open_trackers
from services.trainer.trackers.json_lines import JsonLines
from services.trainer.trackers.numbers import numbers
from services.trainer.trackers.tracker import Sink, Tracker, close
from tests.store_data import run_spec

STEP: dict[str, Any] = {
    "type": "step",
    "step": 3,
    "attempt": 1,
    "num_steps": 9,
    "objective": "forward_kl",
    "loss": 0.5,
    "policy_mismatch_kl": None,
    "policy_mismatch_by_server": {"rollout-0": {"tokens": 7, "kl": 1e-9}},
    "seconds": {"total": 2.0},
}


def failures(name: str) -> float:
    return REGISTRY.get_sample_value("foundry_trainer_tracker_failures_total", {"tracker": name}) or 0.0


class Kept:
    """Fails where `fail` says so."""

    def __init__(self, fail: Callable[[Mapping[str, Any]], None] = lambda event: None) -> None:
        self.events: list[Mapping[str, Any]] = []
        self.closed = False
        self._fail = fail

    def write(self, event: Mapping[str, Any]) -> None:
        self._fail(event)
        self.events.append(event)

    def close(self) -> None:
        self.closed = True


def test_all_that_waits_is_taken_before_the_end() -> None:
    sink = Kept()
    tracked = Tracker("json", lambda: sink)
    events = [{"type": "step", "step": step} for step in range(500)]
    for event in events:
        tracked.tell(event)
    close([tracked], 30)
    assert (sink.events, sink.closed) == (events, True)


def test_one_that_fails_loses_only_what_it_failed_with() -> None:
    def fail(event: Mapping[str, Any]) -> None:
        if event["step"] % 2:
            raise OSError(28, "No space left on device")

    sink, before = Kept(fail), failures("wandb")
    with capture_logs() as logs:
        tracked = Tracker("wandb", lambda: sink)
        for step in range(6):
            tracked.tell({"type": "step", "step": step})
        close([tracked], 30)
    assert [event["step"] for event in sink.events] == [0, 2, 4]
    assert failures("wandb") - before == 3
    said = [(line["event"], line["tracker"], line["reason"]) for line in logs]
    assert said == [("tracker failed", "wandb", "OSError")]


def test_one_that_cannot_be_opened_is_done_without() -> None:
    def missing() -> Sink:
        raise ExtraMissing("wandb not installed: pip install 'cartridge-foundry[wandb]'")

    before = failures("wandb")
    with capture_logs() as logs:
        tracked = Tracker("wandb", missing)
        tracked.tell(STEP)
        close([tracked], 30)
    assert failures("wandb") - before == 1
    assert [(line["reason"], "pip install" in line["error"]) for line in logs] == [("EXTRA_MISSING", True)]


def test_one_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "MAX_WAITING", 3)
    begun, may_go_on = Event(), Event()

    def hang(_: Mapping[str, Any]) -> None:
        begun.set()
        may_go_on.wait(30)

    sink, other, before = Kept(hang), Kept(), failures("trackio")
    hanging, working = Tracker("trackio", lambda: sink), Tracker("json", lambda: other)
    with capture_logs() as logs:
        hanging.tell(STEP)
        assert begun.wait(30)
        for _ in range(5):
            hanging.tell(STEP)
        working.tell(STEP)
        close([hanging, working], 0.2)
    working.join(30)
    assert other.closed
    # Three wait, two are lost; and it is left behind.
    assert failures("trackio") - before == 2
    assert [line["event"] for line in logs if line["tracker"] == "trackio"] == ["tracker failed", "tracker left behind"]
    may_go_on.set()
    hanging.join(30)
    assert len(sink.events) == 4


def test_json_lines_hold_every_event_over_crashes(tmp_path: Path) -> None:
    file = tmp_path / "below" / "run-a.jsonl"
    first = JsonLines(file)
    first.write(STEP)
    first.close()
    with file.open("ab") as torn:
        torn.write(b'{"type": "st')
    second = JsonLines(file)
    second.write(STEP | {"attempt": 2, "note": "\u2028é"})
    second.close()
    lines = file.read_bytes().removesuffix(b"\n").split(b"\n")
    assert lines[1] == b'{"type": "st'
    one, two = json.loads(lines[0]), json.loads(lines[2])
    assert one.pop("time") <= two.pop("time")
    assert (one, two) == (STEP, STEP | {"attempt": 2, "note": "\u2028é"})


def test_what_is_drawn_are_the_numbers() -> None:
    assert numbers(STEP) == {
        "train/loss": 0.5,
        "train/policy_mismatch_by_server/rollout-0/tokens": 7,
        "train/policy_mismatch_by_server/rollout-0/kl": 1e-9,
        "train/seconds/total": 2.0,
    }
    assert numbers({"type": "heldout", "step": 3, "kl": 0.25, "general_kl": None}) == {"heldout/kl": 0.25}
    assert numbers({"type": "progress", "done": 1}) == {}


def test_json_lines_are_always_written(tmp_path: Path) -> None:
    settings = TrainerSettings.model_validate(
        {
            "model": tmp_path,
            "store": {"redis_url": "redis://127.0.0.1:1", "objects_url": f"file://{tmp_path}"},
            "tracking_directory": tmp_path,
        }
    )
    (only,) = open_trackers(settings, ClaimedRun(run_id="run-a", attempt=1, spec=run_spec(), desired=Desired.CONTINUE))
    only.tell(STEP)
    close([only], 30)
    assert json.loads((tmp_path / "run-a.jsonl").read_text())["loss"] == 0.5
