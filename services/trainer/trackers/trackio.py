"""trackio: in a local database, or where its own variables say: TRACKIO_DIR, TRACKIO_SPACE_ID."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foundry import extras
from foundry.store import ClaimedRun
from services.trainer.trackers.numbers import numbers


class Trackio:
    def __init__(self, claimed: ClaimedRun, project: str, directory: Path) -> None:
        """Raises ExtraMissing, and what the library raises."""
        extras.require("trackio", ("trackio",))
        # Read when it is imported.
        os.environ.setdefault("TRACKIO_DIR", str(directory))
        import trackio

        self._run = trackio.init(
            project=project,
            name=f"{claimed.spec.name} {claimed.run_id}",
            resume="allow",
            config=claimed.spec.model_dump(mode="json"),
            embed=False,
            # Prometheus has the machine.
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def write(self, event: Mapping[str, Any]) -> None:
        if found := numbers(event):
            self._run.log(found, step=event["step"])

    def close(self) -> None:
        self._run.finish()
