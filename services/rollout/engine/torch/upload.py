"""Copying cartridges to the device beside the forward passes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

# One thread fills pinned memory far more slowly than the device takes it.
_LANES = 4


class Upload:
    """Layer by layer through pinned memory, on a stream of its own: the stream that decodes never waits for it.

    Pinned memory is made once, two layers' worth for each of a few threads: pinning a whole cartridge takes longer than
    copying it.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._lanes = [_Lane(self._stream) for _ in range(_LANES)]
        self._threads = ThreadPoolExecutor(_LANES, thread_name_prefix="upload")
        self._lock = threading.Lock()

    def copy(self, kv_L2GPD: Tensor) -> Tensor:
        """The cartridge on the device, complete. Blocks the calling thread only."""
        decoding = torch.cuda.current_stream(self._device)
        with self._lock:
            with torch.cuda.stream(self._stream):
                there_L2GPD = torch.empty(kv_L2GPD.shape, dtype=self._dtype, device=self._device)
            copies = [
                self._threads.submit(lane.copy, there_L2GPD[first::_LANES], kv_L2GPD[first::_LANES])
                for first, lane in enumerate(self._lanes)
            ]
            # All, also when one fails: they write into memory that is let go of then.
            wait(copies)
            self._stream.synchronize()
            for copied in copies:
                copied.result()
        # The memory was taken on one stream and is read on another: it must not be given away before both are done.
        there_L2GPD.record_stream(decoding)
        return there_L2GPD


class _Lane:
    """One thread's staging, two layers' worth: one is filled while the other one is copied."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._staging: list[Tensor] = []
        self._copied: list[Any] = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def copy(self, there_L2GPD: Tensor, kv_L2GPD: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            for layer, kv_2GPD in enumerate(kv_L2GPD):
                staging, copied = self._staged(kv_2GPD.nbytes)[layer % 2], self._copied[layer % 2]
                copied.synchronize()
                here = staging[: kv_2GPD.nbytes].view(kv_2GPD.dtype).view(kv_2GPD.shape)
                here.copy_(kv_2GPD)
                there_L2GPD[layer].copy_(here, non_blocking=True)
                copied.record(self._stream)

    def _staged(self, num_bytes: int) -> list[Tensor]:
        if not self._staging or self._staging[0].nbytes < num_bytes:
            self._staging = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        return self._staging
