"""Settings of the gateway."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from foundry.settings import ServiceSettings
from foundry.store.settings import StoreSettings


class GatewaySettings(ServiceSettings):
    """The gateway: the REST API for people and applications. It is served as plain HTTP, with the TLS files set too."""

    listen: str = "127.0.0.1:8000"
    """host:port to serve HTTP on; port 0 takes a free one."""

    rollout_addresses: list[str] = Field(default=["127.0.0.1:7001"], min_length=1)
    """host:port of the rollout servers. A name with several addresses (a headless Service) stands for all of them."""

    teacher_address: str | None = None
    """host:port of the teacher, as the trainer has it. With it, a new run's document is measured at once against the
    model's context and the number of cartridge tokens."""

    store: StoreSettings
    """Where documents, runs and cartridges are."""

    tokenizer: Path | None = None
    """tokenizer.json of the served model, to spell tokens in `logprobs`. Without it they are written `token_id:N`."""

    request_timeout_seconds: float = Field(default=600.0, gt=0)
    """Longest time to answer one request, all attempts together."""

    retry_timeout_seconds: float = Field(default=5.0, ge=0)
    """How long a request that has no token yet is tried again while rollout servers are unavailable."""

    poll_seconds: float = Field(default=2.0, gt=0)
    """Time between two looks at which rollout servers there are and what they serve."""

    max_request_bytes: int = Field(default=3 * 1024**2, ge=1024, le=3 * 1024**2)
    """Largest request body, documents apart (those: `store.max_document_bytes`). A prompt must fit a gRPC message."""

    max_concurrent_requests: int = Field(default=1024, ge=1)
    """Completions in flight; more are refused with 429."""

    max_choices: int = Field(default=128, ge=1)
    """Most choices (prompts times n) of one request."""

    grace_seconds: float = Field(default=30.0, ge=0)
    """How long requests in flight may go on after SIGTERM."""
