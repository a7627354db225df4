"""Settings of the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from foundry.settings import ModelSettings


class TeacherSettings(ModelSettings):
    """The teacher: logprobs and hidden states behind whole documents."""

    listen: str = "127.0.0.1:7002"
    """host:port to serve gRPC on; port 0 takes a free one."""

    reserve_tokens: int = 1024
    """Tokens of the model's context kept free for turn and answer, a quarter of it at the most; a document may take
    the rest."""

    context_budget_bytes: int = 4 * 1024**3
    """Memory of the device for the KV of documents; of the least recently used it makes room for others. In all tiers:
    those used last are kept."""

    host_context_budget_bytes: int | None = Field(default=None, ge=0)
    """Host memory, pinned and in pages of 16 MiB, for the KV of documents that had to leave the device: they come back
    without being computed. Unset: 0 on the CPU, where both are the same memory, else 4 GiB. 0 keeps none."""

    disk_context_budget_bytes: int = Field(default=0, ge=0)
    """Disk for the KV of documents, which then outlives the teacher. Each is written when it was computed: more than
    device and host have, or it only serves the next start. 0 keeps none."""

    disk_context_directory: Path | None = None
    """Directory of this teacher alone for disk_context_budget_bytes. It holds what the documents say: treat it as you
    treat them."""

    micro_batch_tokens: int = 4608
    """Most tokens in one forward over turns and answers."""

    max_pending_requests: int = 64
    """Calls that may wait; more are refused with RESOURCE_EXHAUSTED."""

    grace_seconds: float = 30.0
    """How long calls in flight may go on after SIGTERM."""

    @model_validator(mode="after")
    def _a_disk_budget_has_its_directory(self) -> Self:
        if bool(self.disk_context_budget_bytes) != (self.disk_context_directory is not None):
            raise ValueError(
                "disk_context_budget_bytes and disk_context_directory belong together: set both or neither"
            )
        return self
