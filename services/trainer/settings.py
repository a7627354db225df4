"""Settings of the trainer."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import Field

from foundry.settings import ModelSettings
from foundry.store.settings import StoreSettings


class TrainerSettings(ModelSettings):
    """The trainer: takes runs from the queue, one at a time, and trains their cartridges."""

    listen: str = "127.0.0.1:7003"
    """host:port to serve gRPC on; port 0 takes a free one."""

    rollout_addresses: list[str] = Field(default=["127.0.0.1:7001"], min_length=1)
    """host:port of the rollout servers; each batch is dealt out to them in turn. A name with several addresses (a
    headless Service) stands for all of them."""

    teacher_address: str = "127.0.0.1:7002"
    """host:port of the teacher. A name with several addresses stands for all of them: each document has one of them,
    and another while that one is away."""

    store: StoreSettings
    """Where versions, documents and runs are kept."""

    run: str = ""
    """Id of the one run to see to its end, or until it is paused; the process then exits: with 3 if the run failed, 143
    if it was told to stop first, else 0. Empty: take runs from the queue, for ever."""

    worker: str = Field(default_factory=socket.gethostname)
    """Name of this worker in the records of runs."""

    lease_seconds: float = Field(default=15.0, gt=0)
    """A run whose worker was silent for so long is given to another."""

    rollout_timeout_seconds: float = Field(default=600.0, gt=0)
    """Deadline of one batch of answers."""

    teacher_timeout_seconds: float = Field(default=600.0, gt=0)
    """Deadline of one batch of scores and of computing a document's KV."""

    patience_seconds: float = Field(default=3600.0, gt=0)
    """How long a run waits for a service or store that is away before it fails."""

    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Most tokens in one packed forward and backward; more are accumulated. Unset: on a GPU as many as fit into the
    memory that is free, at most 4608; 4096 on a CPU."""

    signal_memory_bytes: int = Field(default=2**30, ge=0)
    """Memory for the teacher's word on written answers that come up again, which is asked for once."""

    signal_disk_bytes: int = Field(default=2**34, ge=0)
    """The same on disk, where memory is full, in the directory for temporary files. Beyond both it is asked again."""

    rank_timeout_seconds: float = Field(default=600.0, ge=10)
    """Under torchrun: how long one rank waits for another that is silent, because it loads the model or computes its
    share of a gradient, before all end. A process that dies is noticed at once."""

    selfstudy_chunk_tokens: int = Field(default=96, ge=16)
    """Length of the document's pieces that self-study asks about."""

    tracking_directory: Path = Field(
        default_factory=lambda: Path(tempfile.gettempdir()) / f"cartridge-foundry-{os.getuid()}" / "tracking"
    )
    """Where every run has its RUN.jsonl, a line for each of its events, and trackers their files. By default in the
    directory for temporary files; in the local stack's home there."""

    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default=[])
    """Where the numbers of every step go besides: each through its own library, which is the extra of that name. What a
    tracker fails to take is lost to it, logged and counted; no run waits for it."""

    tracking_project: str = "cartridge-foundry"
    """The project that runs belong to in Weights & Biases and trackio."""

    grace_seconds: float = 30.0
    """How long calls in flight may go on after SIGTERM."""
