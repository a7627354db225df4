"""The ranks that torchrun has started for one trainer: messages between them, and sums over them.

Messages and what they carry are on the CPU (gloo); prefix and gradient stay on the device (NCCL, where it is CUDA).
A rank that is asked for nothing has nothing in flight but a receive on the CPU, so that no timeout of NCCL runs while
rank 0 samples. Messages are safetensors: nothing in them is executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from foundry.errors import RankLost
from foundry.identity import read_safetensors_header


@dataclass(frozen=True, slots=True)
class Rank:
    """Which of torchrun's processes this is; the only one where there is no torchrun."""

    rank: int = 0
    # Among those of this machine or pod.
    local_rank: int = 0
    num_ranks: int = 1

    @classmethod
    def of_process(cls) -> Self:
        return cls(*(int(os.environ.get(name, default)) for name, default in _VARIABLES))

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def device(self, wanted: str) -> str:
        """Of several ranks each has a GPU of its own."""
        return f"cuda:{self.local_rank}" if wanted == "cuda" and self.num_ranks > 1 else wanted


_VARIABLES = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))


@dataclass(frozen=True, slots=True)
class RankMessage:
    kind: str
    # What JSON can say.
    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        about = {"kind": self.kind, "values": json.dumps(self.values)}
        return save({name: tensor.detach().cpu() for name, tensor in self.tensors.items()}, metadata=about)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        about = read_safetensors_header(content)["__metadata__"]
        return cls(about["kind"], json.loads(about["values"]), load(content))


class Group:
    """What waits for another rank raises RankLost: at once if its process has died, else after the timeout."""

    def __init__(self, rank: Rank, device: torch.device, timeout_seconds: float) -> None:
        """Waits for all ranks."""
        self.num_ranks = rank.num_ranks
        self.device = device
        cuda = device.type == "cuda"
        self.use_device()
        with _losing("the other ranks"):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_seconds)
            )

    def use_device(self) -> None:
        """In this thread: what names no GPU takes that of the thread, which is the first unless it is set."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def send(self, rank: int, message: RankMessage) -> None:
        content = torch.frombuffer(bytearray(message.to_bytes()), dtype=torch.uint8)
        with _losing(f"rank {rank}"):
            dist.send(torch.tensor([content.numel()]), rank)
            dist.send(content, rank)

    def receive(self, rank: int) -> RankMessage:
        size = torch.empty(1, dtype=torch.int64)
        with _losing(f"rank {rank}"):
            dist.recv(size, rank)
            content = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(content, rank)
        return RankMessage.from_bytes(content.numpy().tobytes())

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's values, in place."""
        with _losing("a rank"):
            dist.broadcast(tensor, src=0)

    def sum(self, tensor: Tensor) -> None:
        """Over all ranks, in place on rank 0; on the others the values are lost."""
        with _losing("a rank"):
            dist.reduce(tensor, dst=0)

    def close(self) -> None:
        dist.destroy_process_group()


@contextmanager
def _losing(whom: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankLost(f"{whom} can't be reached; all ranks have to start anew: {error}") from error
