"""Signals of answers that never change: scored once and kept, in memory and then on disk, within a budget of each."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file, save_file
from torch import Tensor

from foundry.model.objectives import TopK
from services.trainer.update.gradient import Signal


class SignalCache:
    """What does not fit is not kept. The files are gone when it is closed."""

    def __init__(self, memory_bytes: int, disk_bytes: int) -> None:
        self._memory_left, self._disk_left = memory_bytes, disk_bytes
        self._memory: dict[Hashable, Signal] = {}
        self._files: dict[Hashable, Path] = {}
        self._directory: TemporaryDirectory[str] | None = None

    def get(self, key: Hashable) -> Signal | None:
        """The bits that were put."""
        if key in self._files:
            return _signal(load_file(self._files[key]))
        return self._memory.get(key)

    def put(self, key: Hashable, signal: Signal) -> None:
        tensors = _tensors(signal)
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if num_bytes <= self._memory_left:
            self._memory_left -= num_bytes
            self._memory[key] = signal
        elif num_bytes <= self._disk_left:
            self._disk_left -= num_bytes
            self._directory = self._directory or TemporaryDirectory(prefix="foundry-signals-")
            self._files[key] = Path(self._directory.name) / f"{len(self._files)}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self._files[key])

    def close(self) -> None:
        self._memory.clear()
        self._files.clear()
        if self._directory is not None:
            self._directory.cleanup()


def _tensors(signal: Signal) -> dict[str, Tensor]:
    if isinstance(signal, TopK):
        return {name: getattr(signal, name) for name in TopK.__slots__}
    return {"hidden": signal}


def _signal(tensors: dict[str, Tensor]) -> Signal:
    return tensors["hidden"] if "hidden" in tensors else TopK(**tensors)
