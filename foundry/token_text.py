"""Text as tokens have it: pieces of bytes, of which a text may be cut anywhere."""

from __future__ import annotations

# GPT-2's printable characters, which stand for bytes in byte-level vocabularies
# (https://github.com/openai/gpt-2/blob/master/src/encoder.py, bytes_to_unicode).
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + rank): byte for rank, byte in enumerate(_OTHERS)}


def overlap(text: str, mark: str) -> int:
    """Characters at the end of a text that may be the beginning of the mark, which is not whole there."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:size])), 0)
