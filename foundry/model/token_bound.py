"""How few tokens a text can have, known from its bytes alone: what can't fit need not be tokenised.

Of a byte-level BPE, or one that falls back to bytes, every byte that the vocabulary knows is in some token, and no
token stands for more bytes than the longest there is. That holds too for the letters and digits alone, of which tokens
have far fewer than the long runs of spaces and dashes that vocabularies keep. Nothing here is an estimate: of a
tokenizer with a part that may drop or shorten text nothing is said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

from foundry.token_text import BYTE_OF

_LETTERS = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
_BYTES = frozenset(range(256))
# Canonical composition makes at most three bytes one (https://unicode.org/reports/tr15, maximum expansion factors).
_MAX_COMPOSED = 3
_COMPOSING = frozenset({"NFC", "NFD"})
_GROWING = frozenset({"Prepend", "Replace"})
_KEEPING = frozenset({"ByteLevel", "Digits", "Metaspace", "Split"})


class TokenBound:
    """Of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # Most bytes, and most letters and digits, that a token stands for; 0 where that is not known.
        self._most_bytes = self._most_letters = 0
        self._composes = False
        self._uncounted = self._unlettered = b""
        if not tokenizer.is_fast:
            return
        backend: Tokenizer = tokenizer.backend_tokenizer
        normalizers, splitters = set(_kinds(backend.normalizer)), set(_kinds(backend.pre_tokenizer))
        known = _known_bytes(backend.model, byte_level="ByteLevel" in splitters)
        if not (normalizers <= _COMPOSING | _GROWING and splitters <= _KEEPING and known):
            return
        self._uncounted = bytes(_BYTES - known)
        self._unlettered = bytes(_BYTES - (known & _LETTERS))
        self._composes = bool(normalizers & _COMPOSING)
        added = backend.get_added_tokens_decoder().values()
        # Byte-level spells a byte by one character, which for letters is the letter.
        size = len if "ByteLevel" in splitters else _num_bytes
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._most_letters = max(sum(ord(each) in _LETTERS for each in token) for token in vocabulary)
        # One that takes the spaces beside it may take any number.
        if not any(token.lstrip or token.rstrip for token in added):
            self._most_bytes = max([*map(size, vocabulary), *(_num_bytes(token.content) for token in added)])

    def fewest(self, text: str) -> int:
        """No tokenisation of the text has fewer tokens; 0 where nothing is known."""
        content = text.encode()
        if not self._composes or text.isascii():
            return max(
                _shares(content, self._uncounted, self._most_bytes),
                _shares(content, self._unlettered, self._most_letters),
            )
        # A letter and its accent become a character that is no such letter, and whose bytes may be unknown.
        return 0 if self._uncounted else _shares(content, b"", _MAX_COMPOSED * self._most_bytes)


def _shares(content: bytes, uncounted: bytes, most: int) -> int:
    return -(-len(content.translate(None, uncounted)) // most) if most else 0


def _kinds(part: Any) -> Iterator[str]:
    """Of a normalizer or pre-tokenizer, those that it is made of; one that drops text is named otherwise."""
    if part is not None:
        yield from _described(json.loads(part.__getstate__()))


def _described(part: dict[str, Any]) -> Iterator[str]:
    match part:
        case {"type": "Sequence", "normalizers": parts} | {"type": "Sequence", "pretokenizers": parts}:
            for each in parts:
                yield from _described(each)
        case {"type": "Split", "behavior": "Removed"}:
            yield "removing"
        case {"type": "Replace", "pattern": pattern, "content": content}:
            yield "Replace" if (pattern, content) == ({"String": " "}, "\u2581") else "replacing"
        case _:
            yield part["type"]


def _known_bytes(model: Any, *, byte_level: bool) -> frozenset[int]:
    """Those that are never dropped, and never one unknown token together with others."""
    if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return frozenset()
    if byte_level:
        return frozenset(byte for token, byte in BYTE_OF.items() if model.token_to_id(token) is not None)
    falls_back = model.byte_fallback and all(model.token_to_id(f"<0x{byte:02X}>") is not None for byte in _BYTES)
    return _BYTES if falls_back else frozenset()


def _num_bytes(text: str) -> int:
    return len(text.encode())
