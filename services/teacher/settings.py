"""Settings of the teacher."""

from __future__ import annotations

from foundry.settings import ModelSettings


class TeacherSettings(ModelSettings):
    """The teacher: logprobs and hidden states behind whole documents."""

    listen: str = "127.0.0.1:7002"
    """host:port to serve gRPC on; port 0 takes a free one."""

    reserve_tokens: int = 1024
    """Tokens of the model's context kept free for turn and answer, a quarter of it at the most; a document may take
    the rest."""

    context_budget_bytes: int = 4 * 1024**3
    """Memory for the KV of documents; the least recently used are dropped first."""

    micro_batch_tokens: int = 4608
    """Most tokens in one forward over turns and answers."""

    max_pending_requests: int = 64
    """Calls that may wait; more are refused with RESOURCE_EXHAUSTED."""

    grace_seconds: float = 30.0
    """How long calls in flight may go on after SIGTERM."""
