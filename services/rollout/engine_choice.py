"""Which engine decodes where the settings leave it open."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import structlog
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from foundry import extras
from services.rollout.settings import RolloutSettings

log = structlog.get_logger(__name__)


def choose_engine(settings: RolloutSettings) -> RolloutSettings:
    """The settings with an engine named where they say `auto`: the built-in one, which behind a cartridge is ahead of
    vLLM on a GPU too, unless it can't run there and vLLM is installed."""
    if settings.engine != "auto":
        return settings
    engine, why = "torch", "vLLM is for GPUs"
    if settings.device.startswith("cuda"):
        why = _obstacle(settings.model)
        if not why:
            why = "the built-in one runs this model as CUDA graphs"
        elif extras.missing(extras.VLLM):
            why += "; nor is vLLM installed"
        else:
            engine = "vllm"
    log.info("engine chosen", engine=engine, why=why)
    return settings.model_copy(update={"engine": engine})


def _obstacle(model: Path) -> str:
    """Why the built-in engine can't run a model on CUDA; empty if it can, or if there is no model: loading says so."""
    if find_spec("triton") is None:
        return "Triton, which compiles the built-in one's kernels, is not installed"
    if not (model / "config.json").is_file():
        return ""
    config = AutoConfig.from_pretrained(model, local_files_only=True)
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if family is None or not family._supports_attention_backend:
        return f"transformers has no attention interface for {config.model_type}, which the built-in one needs"
    return ""
