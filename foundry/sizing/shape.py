"""What of a decoder decides its memory and its arithmetic: the sizes of its matrices and heads. No weights, no torch.

Norms and biases are left out: less than 0.1 % of any model here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foundry.errors import InvalidArgument, ModelNotFound, ModelUnsupported
from foundry.identity import DTYPE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A dense decoder with grouped-query attention and a gated MLP (Llama, Qwen, Mistral)."""

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    tied_embeddings: bool = False
    bytes_per_number: int = 2

    def __post_init__(self) -> None:
        for field in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size", "intermediate_size"):
            if getattr(self, field) < 1:
                raise InvalidArgument(f"{field} is {getattr(self, field)}, must be at least 1", field=field)
        if self.num_heads % self.num_kv_heads:
            raise InvalidArgument(
                f"{self.num_heads} heads cannot share {self.num_kv_heads} kv heads evenly", field="num_kv_heads"
            )

    @property
    def layer_parameters(self) -> int:
        """Of all layers: queries and output, keys and values, and the MLP's three matrices."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        return self.layer_parameters + self.head_parameters * (1 if self.tied_embeddings else 2)

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.bytes_per_number

    @property
    def decode_read_bytes(self) -> int:
        """Weights that one decode step reads: all layers and the LM head; of the embeddings a row for each token."""
        return (self.layer_parameters + self.head_parameters) * self.bytes_per_number

    @property
    def kv_numbers_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        return self.kv_numbers_per_token * self.bytes_per_number

    def linear_flops(self, num_tokens: float) -> float:
        """Of the layers' matrices, forward: a multiplication and an addition per parameter and token."""
        return 2.0 * self.layer_parameters * num_tokens

    def head_flops(self, num_tokens: float) -> float:
        return 2.0 * self.head_parameters * num_tokens

    def attention_flops(self, num_tokens: float, mean_context: float) -> float:
        """Forward: scores and weighted values, 2 FLOP each per query head, dimension, token and token seen."""
        return 4.0 * self.num_layers * self.num_heads * self.head_dim * num_tokens * mean_context


def _shape(name: str, layers: int, heads: int, kv_heads: int, head_dim: int, *sizes: int, **rest: Any) -> ModelShape:
    hidden, intermediate, vocab = sizes
    return ModelShape(
        name=name,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=hidden,
        intermediate_size=intermediate,
        vocab_size=vocab,
        **rest,
    )


# From the config.json that each model is published with; bfloat16, but for the demo model, which runs on CPUs.
SHAPES = {
    shape.name: shape
    for shape in (
        _shape("smollm2-135m", 30, 9, 3, 64, 576, 1536, 49152, tied_embeddings=True, bytes_per_number=4),
        _shape("llama-3.2-3b", 28, 24, 8, 128, 3072, 8192, 128256, tied_embeddings=True),
        _shape("llama-3.1-8b", 32, 32, 8, 128, 4096, 14336, 128256),
        _shape("qwen2.5-32b", 64, 40, 8, 128, 5120, 27648, 152064),
        _shape("llama-3.3-70b", 80, 64, 8, 128, 8192, 28672, 128256),
    )
}


def read_shape(directory: Path) -> ModelShape:
    """The shape in a model directory's config.json. Raises ModelNotFound, ModelUnsupported."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"{path} can't be read as a model's configuration: {error}", field="model") from error
    return shape_of_config(directory.name, config.get("text_config", config))


def shape_of_config(name: str, config: Mapping[str, Any]) -> ModelShape:
    """Raises ModelUnsupported for what is no dense decoder, naming the key."""
    experts = [key for key in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(key)]
    if experts:
        raise ModelUnsupported(f"{name} has {experts[0]}: this arithmetic is for dense models", field="model")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return ModelShape(
            name=name,
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            tied_embeddings=bool(config.get("tie_word_embeddings")),
            bytes_per_number=DTYPE_BYTES[dtype],
        )
    except KeyError as error:
        raise ModelUnsupported(f"{name}'s configuration is not a dense decoder's: {error}", field="model") from error
