"""Settings of the services that run the frozen model."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field

from foundry.identity import Dtype
from foundry.settings import ServiceSettings


class ModelSettings(ServiceSettings):
    """What every service takes that runs the frozen model."""

    model: Path
    """Directory of the frozen model (configuration, tokenizer, safetensors)."""

    device: str = "cpu"
    """Torch device: cpu, cuda, cuda:1, mps. Under torchrun `cuda` is the GPU of the process's local rank."""

    dtype: Dtype = "auto"
    """Numbers of the model, the same in all services: auto is bfloat16 on CUDA and float32 elsewhere."""

    template_clock: datetime = datetime(2024, 7, 26, tzinfo=UTC)
    """Date that the model's chat template writes where it would write today's, the same in all services: a document's
    context must not change overnight. Services that write different dates refuse each other's ids. The default is what
    Llama 3's own template writes where it has no clock."""

    num_threads: int = Field(default=0, ge=0)
    """CPU threads of torch; 0 leaves its default."""
