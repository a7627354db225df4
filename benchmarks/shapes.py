"""Shapes of models that are measured with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny import build_tokenizer

# Llama-3.2-3B's: KV of 114,688 bytes a token in bfloat16.
LLAMA_3B: dict[str, Any] = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
}

# To try a program.
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def build_model(directory: Path, device: str, shape: dict[str, Any], num_positions: int) -> None:
    """With a vocabulary of Llama's size and next to no chance that a drawn token ends the answer."""
    config = LlamaConfig(
        **shape, vocab_size=128_256, max_position_embeddings=num_positions, eos_token_id=2, bos_token_id=None
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    build_tokenizer().save_pretrained(directory)
    model.to(torch.bfloat16).save_pretrained(directory)
