"""The fingerprint of a model: two services exchange work only if theirs are equal."""

from __future__ import annotations

from pathlib import Path

from foundry.errors import ModelNotFound

# What decides the numbers and the token ids. Generation defaults do not: sampling travels with each request.
_PATTERNS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "*.safetensors",
)


def fingerprint_model(directory: Path) -> str:
    """BLAKE3 over the names and digests of the model's configuration, tokenizer, template and weight files.

    Raises ModelNotFound if there is no directory, or no configuration or no safetensors weights in it.
    """
    from blake3 import blake3

    if not directory.is_dir():
        raise ModelNotFound(f"no model directory at {directory}")
    files = sorted({path for pattern in _PATTERNS for path in directory.glob(pattern)})
    names = {path.name for path in files}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise ModelNotFound(f"{directory} is no model: expected config.json and *.safetensors in it")
    total = blake3()
    for path in files:
        digest = blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
        total.update(f"{path.name}\0{digest}\n".encode())
    return f"blake3:{total.hexdigest()}"
