"""What CUDA devices report on /metrics, asked when it is scraped. Without CUDA there is nothing to report."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import torch
from prometheus_client import Gauge

MEMORY_USED = Gauge(
    "foundry_gpu_memory_used_bytes", "Memory of a CUDA device that is in use, by whatever process.", ["device"]
)
MEMORY = Gauge("foundry_gpu_memory_bytes", "Memory of a CUDA device.", ["device"])
UTILIZATION = Gauge(
    "foundry_gpu_utilization_ratio",
    "Share of the last second in which a kernel ran on a CUDA device; where NVIDIA's library (nvidia-ml-py) is there.",
    ["device"],
)


def observe_gpus() -> None:
    """Report every CUDA device that this process sees. The figures are the driver's: no kernel is waited for."""
    for index in range(torch.cuda.device_count()):
        device = str(index)
        MEMORY_USED.labels(device).set_function(partial(_used_bytes, index))
        MEMORY.labels(device).set(torch.cuda.get_device_properties(index).total_memory)
        if find_spec("pynvml") is not None:
            UTILIZATION.labels(device).set_function(partial(_utilization, index))


def _used_bytes(index: int) -> float:
    free_bytes, total_bytes = torch.cuda.mem_get_info(index)
    return total_bytes - free_bytes


def _utilization(index: int) -> float:
    return torch.cuda.utilization(index) / 100
