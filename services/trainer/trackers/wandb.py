"""Weights & Biases. Its own variables say where to and as whom: WANDB_API_KEY, WANDB_ENTITY, WANDB_MODE=offline ..."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foundry import extras
from foundry.store import ClaimedRun
from services.trainer.trackers.numbers import numbers


class Wandb:
    """One run there for each run here, whatever worker has it."""

    def __init__(self, claimed: ClaimedRun, project: str, directory: Path) -> None:
        """Raises ExtraMissing, and what the library raises."""
        extras.require("wandb", ("wandb",))
        import wandb

        directory.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=project,
            id=claimed.run_id,
            name=f"{claimed.spec.name} {claimed.run_id}",
            resume="allow",
            dir=directory,
            config=claimed.spec.model_dump(mode="json"),
            # Not what the service prints, nor the machine: Prometheus has that.
            settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True),
        )
        self._exit_code = 0

    def write(self, event: Mapping[str, Any]) -> None:
        if found := numbers(event):
            self._run.log(found, step=event["step"])
        if event.get("state") == "failed":
            self._exit_code = 1

    def close(self) -> None:
        self._run.finish(exit_code=self._exit_code)
