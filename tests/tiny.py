"""Tiny random models of real architectures: two layers, a byte-level tokenizer, a ChatML template.

The same arguments give the same files, hence the same fingerprint, so a session may build one and share it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

if TYPE_CHECKING:
    # Benchmarks, which make these models too, do without it.
    import pytest

Family = Literal["llama", "qwen2", "qwen3"]

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Qwen's: tools in the system turn, calls and their results in marks, a switch of its own.
TOOLS_CHATML = (
    "{%- if tools or messages[0].role == 'system' %}{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}"
    "{%- if tools %}{{- '\\n# Tools\\n<tools>' }}{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}"
    "{{- '\\n</tools>' }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{%- elif m.role != 'system' or not loop.first %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.content %}{{- m.content }}{%- endif %}"
    "{%- for call in m.tool_calls or [] %}{{- '\\n<tool_call>\\n' }}"
    '{{- \'{"name": "\' + call.function.name + \'", "arguments": \' '
    "+ (call.function.arguments | tojson) + '}\\n</tool_call>' }}{%- endfor %}{%- endif %}"
    "{%- if m.role != 'system' or not loop.first %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
# What templates take for today.
CLOCK = datetime(2024, 7, 26, tzinfo=UTC)
_TEXT = (
    "The state of the union is a message that the president sends to the congress. "
    "What does the document say about the treaty, the harbour and the price of grain? "
    "It says that the treaty was signed in the spring and that the harbour is open again. "
    "system user assistant question answer because therefore"
)
_VOCAB_SIZE = 384


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over 384 ids: any text round-trips, and a character may take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def lengths_encoded(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the characters of each text that the tokenizer is given from now on."""
    lengths: list[int] = []
    encode = type(tokenizer)._encode_plus

    def noting(self: PreTrainedTokenizerBase, text: str, **options: Any) -> Any:
        lengths.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "_encode_plus", noting)
    return lengths


def build_model(family: Family = "llama", seed: int = 0, head_dim: int = 16) -> PreTrainedModel:
    """Random weights, biases and norms, wide enough that attention and logits are far from uniform."""
    shape: dict[str, Any] = {
        "vocab_size": _VOCAB_SIZE,
        "hidden_size": 4 * head_dim,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "tie_word_embeddings": family == "qwen2",
        "eos_token_id": SPECIAL_TOKENS.index("<|im_end|>"),
        "bos_token_id": None,
        "pad_token_id": SPECIAL_TOKENS.index("<|endoftext|>"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel
        if family == "llama":
            model = LlamaForCausalLM(LlamaConfig(**shape, head_dim=head_dim))
        elif family == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**shape))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=head_dim))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config = GenerationConfig(
        eos_token_id=[SPECIAL_TOKENS.index("<|im_end|>"), SPECIAL_TOKENS.index("<|endoftext|>")],
        pad_token_id=SPECIAL_TOKENS.index("<|endoftext|>"),
    )
    return model


def build_tiny_model(directory: Path, family: Family = "llama", seed: int = 0, head_dim: int = 16) -> Path:
    """Write a model directory, unless it is there already, and return it."""
    if not (directory / "model.safetensors").exists():
        directory.mkdir(parents=True, exist_ok=True)
        build_tokenizer().save_pretrained(directory)
        build_model(family, seed, head_dim).save_pretrained(directory)
    return directory
