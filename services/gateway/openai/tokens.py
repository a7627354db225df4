"""How token ids are written in `logprobs`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from foundry.token_text import BYTE_OF

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenSpelling:
    """Spells ids by a tokenizer.json; without one as `token_id:N`, which is vLLM's `return_tokens_as_token_ids`."""

    def __init__(self, tokenizer_file: Path | None) -> None:
        self._tokenizer = None if tokenizer_file is None else Tokenizer.from_file(str(tokenizer_file))
        # 'ByteLevel' stands in the description of the decoder exactly where token strings are GPT-2's bytes.
        byte_level = self._tokenizer is not None and "ByteLevel" in repr(self._tokenizer.decoder)
        self._byte_of = BYTE_OF if byte_level else {}
        self.spell = lru_cache(maxsize=65_536)(self._spell)

    def _spell(self, token_id: int) -> tuple[str, list[int] | None]:
        """The token's text and its bytes, if they are known. A part of a character is spelled by its bytes, as OpenAI
        does: as text, all parts would be the same."""
        token = None if self._tokenizer is None else self._tokenizer.id_to_token(token_id)
        if token is None:
            return f"token_id:{token_id}", None
        content = self._bytes(token)
        try:
            text = content.decode()
        except UnicodeDecodeError:
            text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
        return text, list(content)

    def _bytes(self, token: str) -> bytes:
        if self._byte_of and all(character in self._byte_of for character in token):
            return bytes(self._byte_of[character] for character in token)
        if self._byte_of:  # a special token, which stands for itself
            return token.encode()
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(match[1])
        return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def by_text(logprobs: Iterable[tuple[int, str, float]]) -> dict[str, float]:
    """Logprobs of tokens (id, text, logprob) by their texts; of several with one text the others by their ids, so that
    none is lost."""
    found: dict[str, tuple[int, float]] = {}
    for token_id, text, logprob in logprobs:
        held_by = found.get(text, (token_id,))[0]
        found[text if held_by == token_id else f"token_id:{token_id}"] = (token_id, logprob)
    return {text: logprob for text, (_, logprob) in found.items()}


def places_of(tokens: Iterable[list[int] | None]) -> list[int]:
    """Where each token of a text begins, in characters, from their bytes. Tokens of one character share its place."""
    places, num_begun = [], 0
    for content in tokens:
        begins = [byte & 0xC0 != 0x80 for byte in content or ()]
        places.append(num_begun - 1 if begins and not begins[0] and num_begun else num_begun)
        num_begun += sum(begins)
    return places


def finite(logprob: float) -> float:
    """JSON has no infinity: OpenAI and vLLM write -9999 for a token that can't be sampled."""
    return max(logprob, -9999.0)
