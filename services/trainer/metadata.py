"""The text that stands in a safetensors file beside its tensors."""

from __future__ import annotations

import json


def read_metadata(content: bytes) -> dict[str, str]:
    """https://github.com/huggingface/safetensors#format; the library reads it from files on disk alone."""
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return metadata
