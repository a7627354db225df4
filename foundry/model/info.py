"""What a model's files say without its weights: shapes, rotary embedding, tokenizer, end tokens, fingerprint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from foundry.errors import ModelUnsupported, ShapeMismatch
from foundry.identity import CartridgeHeader, Dtype
from foundry.model.fingerprint import fingerprint_model

# Rotary types whose angles do not depend on how long the sequence is: only then can cached keys be reused.
STATIC_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a cartridge must agree with."""

    fingerprint: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_tokens: int
    rope: Mapping[str, Any]

    def header(self, num_tokens: int, num_frozen: int, dtype: torch.dtype) -> CartridgeHeader:
        return CartridgeHeader(
            model_fingerprint=self.fingerprint,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            num_tokens=num_tokens,
            num_frozen=num_frozen,
            dtype=str(dtype).removeprefix("torch."),
            rope=dict(self.rope),
        )

    def kv_shape(self, num_tokens: int) -> tuple[int, int, int, int, int]:
        """[L, 2, G, P, D] of the KV of so many tokens."""
        return (self.num_layers, 2, self.num_kv_heads, num_tokens, self.head_dim)

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        return math.prod(self.kv_shape(1)) * dtype.itemsize

    def check(self, header: CartridgeHeader) -> None:
        """Raises ShapeMismatch unless a cartridge with this header fits the model, naming every difference."""
        wanted = self.header(header.num_tokens, header.num_frozen, getattr(torch, header.dtype))
        differences = [
            f"{name} {getattr(header, name)!r} (the model has {getattr(wanted, name)!r})"
            for name in ("model_fingerprint", "num_layers", "num_kv_heads", "head_dim", "rope", "position_offset")
            if getattr(header, name) != getattr(wanted, name)
        ]
        if differences:
            raise ShapeMismatch(f"cartridge is not for this model: {'; '.join(differences)}")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as its files describe it."""

    spec: ModelSpec
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]

    @classmethod
    def read(cls, directory: Path) -> ModelInfo:
        """From a model directory. Raises ModelNotFound, ModelUnsupported."""
        fingerprint = fingerprint_model(directory)
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        try:
            generation = GenerationConfig.from_pretrained(directory, local_files_only=True)
        except OSError:
            # A model without the file: what its configuration says, as `transformers` does.
            generation = GenerationConfig.from_model_config(config)
        return cls.of(config, generation, AutoTokenizer.from_pretrained(directory, local_files_only=True), fingerprint)

    @classmethod
    def of(
        cls,
        config: PretrainedConfig,
        generation: GenerationConfig | None,
        tokenizer: PreTrainedTokenizerBase,
        fingerprint: str,
    ) -> ModelInfo:
        """From what was read. Raises ModelUnsupported."""
        text = config.get_text_config()
        _check_supported(text)
        spec = ModelSpec(
            fingerprint=fingerprint,
            num_layers=text.num_hidden_layers,
            num_kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            max_tokens=text.max_position_embeddings,
            rope=_rope(text),
        )
        eos = generation.eos_token_id if generation is not None else text.eos_token_id
        return cls(spec, tokenizer, frozenset([eos] if isinstance(eos, int) else eos or []))

    def text(self, ids: Sequence[int]) -> str:
        """Text of tokens. Special ones steer; they are not text."""
        if self.tokenizer.is_fast:
            # What the wrapper around it adds takes four times as long, for every token of every sequence.
            return str(self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True))
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def resolve_dtype(dtype: Dtype, device: str) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and float32 elsewhere."""
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved


def _rope(config: Any) -> dict[str, Any]:
    rope: dict[str, Any] = {key: value for key, value in dict(config.rope_parameters).items() if value is not None}
    return rope


def _check_supported(config: Any) -> None:
    rope_type = _rope(config).get("rope_type", "default")
    if rope_type not in STATIC_ROPE_TYPES:
        raise ModelUnsupported(f"rope type {rope_type!r} is not one of {sorted(STATIC_ROPE_TYPES)}")
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if layer_types != {"full_attention"} or sliding:
        raise ModelUnsupported("every layer must attend to the whole context: sliding windows are not supported")
    for name, neutral in (("final_logit_softcapping", None), ("attn_logit_softcapping", None), ("logits_scaling", 1.0)):
        if (value := getattr(config, name, neutral)) not in (neutral, None):
            raise ModelUnsupported(f"{name}={value} changes the logits in a way the exact objectives do not know")
