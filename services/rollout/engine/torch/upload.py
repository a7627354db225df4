"""Copying cartridges to the device beside the forward passes."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor


class Upload:
    """Layer by layer through pinned memory, on a stream of its own: the stream that decodes never waits for it.

    Pinned memory is made once, two layers' worth: pinning a whole cartridge takes longer than copying it.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._staging: list[Tensor] = []
        self._copied: list[Any] = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()

    def copy(self, kv_L2GPD: Tensor) -> Tensor:
        """The cartridge on the device, complete. Blocks the calling thread only."""
        decoding = torch.cuda.current_stream(self._device)
        with self._lock, torch.cuda.stream(self._stream):
            self._fit_staging(kv_L2GPD[0])
            there_L2GPD = torch.empty(kv_L2GPD.shape, dtype=self._dtype, device=self._device)
            for layer, kv_2GPD in enumerate(kv_L2GPD):
                staging, copied = self._staging[layer % 2], self._copied[layer % 2]
                copied.synchronize()
                here = staging[: kv_2GPD.nbytes].view(kv_2GPD.dtype).view(kv_2GPD.shape)
                here.copy_(kv_2GPD)
                there_L2GPD[layer].copy_(here, non_blocking=True)
                copied.record(self._stream)
            self._stream.synchronize()
        # The memory was taken on one stream and is read on another: it must not be given away before both are done.
        there_L2GPD.record_stream(decoding)
        return there_L2GPD

    def _fit_staging(self, layer: Tensor) -> None:
        if not self._staging or self._staging[0].nbytes < layer.nbytes:
            self._staging = [torch.empty(layer.nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
