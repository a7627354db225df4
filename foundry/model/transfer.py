"""Copies between host and device by way of pinned memory."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`. To a GPU by way of pinned memory: from elsewhere the host waits for all that is queued.

    The pinned copy may be forgotten at once; torch reuses it only when the device has read it.
    """
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(tensor: Tensor) -> Tensor:
    """On the CPU, complete. From a GPU by way of pinned memory, which torch keeps for the next: fresh memory costs more
    than the copy."""
    there = tensor.to("cpu", non_blocking=True)
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
    return there
