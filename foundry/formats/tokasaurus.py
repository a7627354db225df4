"""Directories of Tokasaurus' cartridge branch: `cartridge.pt`, as the research library writes it, and `config.yaml`."""

from __future__ import annotations

from pathlib import Path

import yaml

from foundry.errors import CartridgeUnreadable
from foundry.formats import research
from foundry.formats.loose import LooseCartridge
from foundry.formats.reading import MAX_CONFIG_BYTES, read_file
from foundry.model.cartridge import Cartridge

CONFIG, WEIGHTS = "config.yaml", "cartridge.pt"


def write(cartridge: Cartridge, directory: Path, *, base_model: str = "") -> None:
    """Write both files. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    # Its servers look into each layer's frozen tokens, also where there are none.
    research.write(cartridge, directory / WEIGHTS, spelling="fixed")
    header = cartridge.header
    config = {
        "kv_cache_initializer": {"max_tokens": header.num_tokens, "num_frozen_tokens": header.num_frozen},
        "model": {"pretrained_model_name_or_path": base_model or None},
    }
    (directory / CONFIG).write_text(yaml.safe_dump(config))


def read(directory: Path) -> LooseCartridge:
    """Raises CartridgeUnreadable, also where the configuration says another number of tokens than there are."""
    try:
        config = yaml.safe_load(read_file(directory / CONFIG, max_bytes=MAX_CONFIG_BYTES))
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        raise CartridgeUnreadable(f"{directory / CONFIG} is not YAML: {error}", field="path") from error
    found = research.read(directory / WEIGHTS)
    initial = config.get("kv_cache_initializer") if isinstance(config, dict) else None
    claimed = initial.get("max_tokens") if isinstance(initial, dict) else None
    num_tokens = found.kv_L2GPD.shape[3]
    if claimed is not None and claimed != num_tokens:
        raise CartridgeUnreadable(
            f"{directory / CONFIG} says {claimed!r:.100} tokens, {WEIGHTS} has {num_tokens}", field="path"
        )
    return found
