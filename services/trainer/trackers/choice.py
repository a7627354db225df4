"""The trackers of a run: JSON lines, and those that the settings name."""

from __future__ import annotations

from collections.abc import Callable

from foundry.store import ClaimedRun
from services.trainer.settings import TrainerSettings
from services.trainer.trackers.json_lines import JsonLines
from services.trainer.trackers.tensorboard import TensorBoard
from services.trainer.trackers.tracker import Sink, Tracker
from services.trainer.trackers.trackio import Trackio
from services.trainer.trackers.wandb import Wandb


def open_trackers(settings: TrainerSettings, claimed: ClaimedRun) -> list[Tracker]:
    """They are opened in their own threads, so that what is wrong with one is not waited for."""
    directory, project, run_id = settings.tracking_directory, settings.tracking_project, claimed.run_id
    known: dict[str, Callable[[], Sink]] = {
        "json": lambda: JsonLines(directory / f"{run_id}.jsonl"),
        "tensorboard": lambda: TensorBoard(directory / "tensorboard" / run_id),
        "wandb": lambda: Wandb(claimed, project, directory),
        "trackio": lambda: Trackio(claimed, project, directory / "trackio"),
    }
    return [Tracker(name, known[name]) for name in ("json", *settings.trackers)]
