"""When two wordings are the same: what is held out must not be trained on in another spelling."""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"\w+")


def normalised(text: str) -> str:
    """The words alone: without case, punctuation, width, accents' composition and white space."""
    return " ".join(_words(text))


def jumbled(text: str) -> str:
    """The set of words: wordings that differ in their order alone, or in words said twice, are near-duplicates."""
    return " ".join(sorted(set(_words(text))))


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
