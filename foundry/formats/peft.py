"""PEFT's CARTRIDGE adapters (https://huggingface.co/docs/peft, peft 0.21): a directory of two files.

`adapter_model.safetensors` has one tensor, `prompt_embeddings` [P, L * 2 * G * D]: for each token the key and value of
each layer, after RoPE. What PEFT does not keep, above all of which model it is, stands in the file's metadata.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from foundry.errors import CartridgeUnreadable, InvalidArgument
from foundry.formats.loose import LooseCartridge
from foundry.formats.reading import MAX_CONFIG_BYTES, read_file
from foundry.identity import CartridgeHeader, read_safetensors_header
from foundry.model.cartridge import Cartridge
from foundry.untrusted import parse_json, parse_object

CONFIG, WEIGHTS, TENSOR = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
_METADATA = "foundry"


def write(cartridge: Cartridge, directory: Path, *, base_model: str = "") -> None:
    """Write the adapter; `base_model` is what PEFT is told to load it on. Raises OSError."""
    header = cartridge.header
    directory.mkdir(parents=True, exist_ok=True)
    embeddings_PX = cartridge.kv_L2GPD.permute(3, 0, 1, 2, 4).reshape(header.num_tokens, -1).contiguous()
    metadata = {"format": "pt", _METADATA: header.canonical().decode()}
    save_file({TENSOR: embeddings_PX}, directory / WEIGHTS, metadata)
    (directory / CONFIG).write_text(json.dumps(_config(header, base_model), indent=2) + "\n")


def read(directory: Path) -> Cartridge | LooseCartridge:
    """The cartridge: with its header if we wrote it, loose if PEFT did. Raises CartridgeUnreadable, ShapeMismatch."""
    content = read_file(directory / WEIGHTS)
    try:
        config = parse_object(read_file(directory / CONFIG, max_bytes=MAX_CONFIG_BYTES))
        if config.get("peft_type") != "CARTRIDGE":
            raise CartridgeUnreadable(f"its peft_type is {config.get('peft_type')!r:.100}, not CARTRIDGE")
        tensors = load(content)
        if set(tensors) != {TENSOR}:
            raise CartridgeUnreadable(f"it has the tensors {sorted(tensors)!r:.200}, expected {TENSOR} alone")
        metadata = read_safetensors_header(content).get("__metadata__") or {}
        if _METADATA in metadata:
            header = CartridgeHeader.from_dict(parse_json(metadata[_METADATA]))
            return Cartridge(header, _kv(tensors[TENSOR], header.num_tokens, *header.shape[:3], header.head_dim))
        return _loose(config, tensors[TENSOR])
    except SafetensorError as error:
        raise CartridgeUnreadable(f"{directory}: {error}", field="path") from error
    except InvalidArgument as error:
        raise CartridgeUnreadable(f"{directory}: {error.message}", field="path") from error


def _loose(config: dict[str, Any], embeddings_PX: Tensor) -> LooseCartridge:
    num_layers, num_kv_heads = _count(config, "num_layers"), _count(config, "num_attention_heads")
    head_dim, rest = divmod(_count(config, "token_dim"), num_kv_heads)
    if rest:
        raise CartridgeUnreadable(f"its token_dim {config['token_dim']} is not {num_kv_heads} heads of one size")
    kv_L2GPD = _kv(embeddings_PX, _count(config, "num_virtual_tokens"), num_layers, 2, num_kv_heads, head_dim)
    return LooseCartridge(kv_L2GPD, _count(config, "num_frozen_tokens", least=0))


def _kv(embeddings_PX: Tensor, *shape: int) -> Tensor:
    if embeddings_PX.shape != (shape[0], math.prod(shape[1:])):
        raise CartridgeUnreadable(
            f"{TENSOR} is {list(embeddings_PX.shape)}, expected {[shape[0], math.prod(shape[1:])]}"
        )
    return embeddings_PX.view(shape).permute(1, 2, 3, 0, 4).contiguous()


def _count(config: dict[str, Any], name: str, *, least: int = 1) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
        raise CartridgeUnreadable(f"its {name} is {value!r:.100}, must be a count")
    return value


def _config(header: CartridgeHeader, base_model: str) -> dict[str, Any]:
    return {
        "peft_type": "CARTRIDGE",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "num_virtual_tokens": header.num_tokens,
        "num_frozen_tokens": header.num_frozen,
        "num_layers": header.num_layers,
        "num_attention_heads": header.num_kv_heads,
        "token_dim": header.num_kv_heads * header.head_dim,
        "num_transformer_submodules": 1,
    }
