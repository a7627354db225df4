"""Each tracker through its own library, and read back by it: `make test-trackers`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foundry.store import ClaimedRun, Desired
from services.trainer.settings import TrainerSettings
from services.trainer.trackers.choice import open_trackers
from services.trainer.trackers.tracker import close
from tests.store_data import run_spec

CLAIMED = ClaimedRun(run_id="run-abcdefgh", attempt=1, spec=run_spec("handbook"), desired=Desired.CONTINUE)
# Steps 1 and 2; then another attempt from the checkpoint of step 1, to which step 2 is another.
ATTEMPTS: list[list[dict[str, Any]]] = [
    [
        {"type": "heldout", "step": 0, "kl": 1.0},
        {"type": "step", "step": 1, "loss": 0.5, "seconds": {"total": 1.0}},
        {"type": "step", "step": 2, "loss": 0.75},
    ],
    [
        {"type": "resumed", "step": 1, "attempt": 2},
        {"type": "step", "step": 2, "loss": 0.25},
        {"type": "heldout", "step": 2, "kl": 0.5},
        {"type": "finished", "state": "succeeded"},
    ],
]


def track(name: str, directory: Path) -> None:
    settings = TrainerSettings.model_validate(
        {
            "model": directory,
            "store": {"redis_url": "redis://127.0.0.1:1", "objects_url": f"file://{directory}"},
            "tracking_directory": directory,
            "trackers": [name],
        }
    )
    for events in ATTEMPTS:
        trackers = open_trackers(settings, CLAIMED)
        for event in events:
            for tracker in trackers:
                tracker.tell(event)
        close(trackers, 120)


def in_a_process(script: str, **environment: str) -> str:
    """As a trainer is one: the libraries keep what their variables say. Returns what it printed."""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tracker failed" not in done.stdout + done.stderr
    return done.stdout


def tracked(name: str, directory: Path, **environment: str) -> None:
    called = f"track({name!r}, pathlib.Path({str(directory)!r}))"
    in_a_process(f"import pathlib\nfrom tests.trackers.test_libraries import track\n{called}", **environment)
    assert len((directory / "run-abcdefgh.jsonl").read_text().splitlines()) == 7


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tracked("tensorboard", tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "tensorboard" / "run-abcdefgh"))
    found.Reload()
    assert [(each.step, each.value) for each in found.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]
    assert [(each.step, each.value) for each in found.Scalars("heldout/kl")] == [(0, 1.0), (2, 0.5)]
    assert [(each.step, each.value) for each in found.Scalars("train/seconds/total")] == [(1, 1.0)]


def leveldb_records(content: bytes, begin: int) -> Iterator[bytes]:
    """Of a log (https://github.com/google/leveldb/blob/main/doc/log_format.md) behind a header of `begin` bytes."""
    record, place = b"", 0
    while place + 7 <= len(content):
        left = 32768 - (place + begin) % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        # Whole, or the last part.
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    tracked("wandb", tmp_path, WANDB_MODE="offline")
    from wandb.proto import wandb_internal_pb2

    found: list[dict[str, Any]] = []
    for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for content in leveldb_records(file.read_bytes()[7:], begin=7):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
            if record.WhichOneof("record_type") == "run":
                assert (record.run.run_id, record.run.project) == ("run-abcdefgh", "cartridge-foundry")
    losses = [(each["_step"], each["train/loss"]) for each in found if "train/loss" in each]
    assert losses == [(1, 0.5), (2, 0.75), (2, 0.25)]
    assert [each["heldout/kl"] for each in found if "heldout/kl" in each] == [1.0, 0.5]


def test_trackio(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    tracked("trackio", tmp_path)
    script = (
        "import json\nfrom trackio.sqlite_storage import SQLiteStorage\n"
        "print(json.dumps(SQLiteStorage.get_logs('cartridge-foundry', 'handbook run-abcdefgh')))"
    )
    printed = in_a_process(script, TRACKIO_DIR=str(tmp_path / "trackio"))
    found = json.loads(printed.splitlines()[-1])
    losses = [(each["step"], each["train/loss"]) for each in found if "train/loss" in each]
    assert losses == [(1, 0.5), (2, 0.75), (2, 0.25)]
