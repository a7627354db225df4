"""Settings of the rollout service."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from foundry.settings import ModelSettings
from foundry.store import StoreSettings


class VllmSettings(BaseModel):
    """The vLLM engine; read where it decodes only."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of the GPU's memory for weights, activations and KV."""

    kv_bytes: int | None = Field(default=None, ge=1)
    """KV memory. Unset: what gpu_memory_utilization leaves. Resident cartridges are in host memory; those in use also
    take their place here, once for all sequences."""

    max_context_tokens: int | None = Field(default=None, ge=2)
    """Most tokens of cartridges, prompt and answer together. Unset: the model's context; KV memory must hold one such
    sequence."""

    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further engine arguments by vLLM's names, as JSON: {"block_size": 32}. Unknown ones are refused, and those that
    the foundry sets."""

    cuda_graphs: bool = True
    """Compile the model and capture CUDA graphs at the start: a minute or two there, a faster decode afterwards. On
    the CPU nothing is compiled."""


class TokasaurusSettings(BaseModel):
    """The external server of the engine tokasaurus; read where it decodes only."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    url: str = "http://127.0.0.1:10210"
    """Where the server of Tokasaurus' cartridge branch listens. It serves the model of `model`."""

    route: Literal["/custom/cartridge/completions", "/v1/cartridge/completions"] = "/custom/cartridge/completions"
    """Where its branch has completions behind cartridges: geoff/cartridges under /custom, earlier ones under /v1."""

    cartridge_dir: Path | None = None
    """The server's own `cartridge_dir`, as this service sees it: cartridges are handed over there. Required."""

    page_tokens: int = Field(default=16, ge=1)
    """The server's `page_size`: only cartridges of whole pages are served."""

    answer_timeout_seconds: float = Field(default=600.0, gt=0)
    """How long the server may take for one answer."""

    connect_timeout_seconds: float = Field(default=5.0, gt=0)
    """How long reaching the server may take."""


class RolloutSettings(ModelSettings):
    """The rollout service: answers behind cartridges."""

    engine: Literal["auto", "torch", "vllm", "tokasaurus"] = "auto"
    """What decodes: torch (built in), vllm (for GPUs; the image's vllm variant, or the extra `vllm`) or tokasaurus (an
    external server, for serving only). auto is torch, but on CUDA vllm where torch can't run the model and vLLM is
    installed; the log says which and why."""

    vllm: VllmSettings = Field(default_factory=VllmSettings)
    """The vLLM engine, where it decodes."""

    tokasaurus: TokasaurusSettings = Field(default_factory=TokasaurusSettings)
    """The external server, where it decodes."""

    listen: str = "127.0.0.1:7001"
    """host:port to serve gRPC on; port 0 takes a free one."""

    model_name: str = ""
    """Name under which the base model is served; empty takes the directory's name."""

    store: StoreSettings
    """Where cartridges are fetched from."""

    max_sequences: int = Field(default=16, ge=1)
    """Sequences decoded at once. With the engine torch each has a slot of max_sequence_tokens in the KV memory."""

    max_sequence_tokens: int = Field(default=2048, ge=2)
    """Most tokens of one prompt and its answer, without those of its cartridges."""

    prefill_tokens_per_step: int = Field(default=512, ge=1)
    """Most prompt tokens in one forward: longer prompts are cut, so that running sequences don't stall behind them.
    vLLM on the CPU does not cut them."""

    max_waiting: int = Field(default=256, ge=0)
    """Sequences that may wait for their turn; more are refused with RESOURCE_EXHAUSTED. A client that has none may
    bring a call nevertheless."""

    max_queue_seconds: float = Field(default=60.0, gt=0)
    """How long a call may wait until the first of its sequences is decoded. One that would wait longer, by what steps
    and answers lately took, is refused at once, with the time to come back."""

    cartridge_budget_bytes: int = Field(default=4 * 1024**3, ge=1)
    """Memory for resident cartridges; of those that no sequence uses, the least recently used are dropped first."""

    host_cartridge_budget_bytes: int | None = Field(default=None, ge=0)
    """Host memory for verified cartridges, from which those dropped from the device come back without the store.
    Unset: 0 on the CPU, where both are the same memory, else 8 GiB. With 0 cartridges are fetched one at a time."""

    prefetch: bool = True
    """Load new versions of the names served here as they are published."""

    grace_seconds: float = Field(default=30.0, ge=0)
    """How long calls in flight may go on after SIGTERM."""
