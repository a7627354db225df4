"""Copies between host and device that neither side waits for."""

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
