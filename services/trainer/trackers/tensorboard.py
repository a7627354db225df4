"""TensorBoard: event files in a directory of the run, read with `tensorboard --logdir`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foundry import extras
from services.trainer.trackers.numbers import numbers


class TensorBoard:
    def __init__(self, directory: Path) -> None:
        """Raises ExtraMissing."""
        extras.require("tensorboard", ("tensorboard",))
        from torch.utils.tensorboard import SummaryWriter

        self._make = SummaryWriter
        self._directory = str(directory)
        self._writer = SummaryWriter(self._directory)

    def write(self, event: Mapping[str, Any]) -> None:
        if event["type"] == "resumed":
            # Steps behind the checkpoint are taken again: what was drawn for them goes.
            self._writer.close()
            self._writer = self._make(self._directory, purge_step=event["step"] + 1)
        for name, value in numbers(event).items():
            self._writer.add_scalar(name, value, event["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
