"""Exercises that visit every sentence of a document: say it on, word for word, or complete it.

Their answers can be the document's own words, so they need no decoding. They are made without knowing the language:
what is cut is cut between tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

# A sentence with the white space after it; lines end sentences too. Some scripts have marks, and spaces, of their own.
_SENTENCE = re.compile(r".+?(?:[.!?…؟।]+[\"'”’)\]]*\s+|[。！？]+[」』”]*\s*|\n+|$)", re.DOTALL)
_SPACE = re.compile(r"\s")
# In characters. What has no space for so long is of a script that has none.
_LONGEST_WORD = 24
_PIECES_TOKENS = (28, 40, 52)
# Of each sentence.
CLOZE_CUTS = 8
# Shorter ones say too little to be found again.
_MIN_CUE_TOKENS = 4
_MIN_ANSWER_TOKENS = 3


@dataclass(frozen=True, slots=True)
class Exercise:
    """What is asked about a document, and the document's own words for it."""

    prompt: str
    answer: str


def sentences(document: str) -> list[str]:
    """The document in order, nothing left out."""
    return _SENTENCE.findall(document)


def recitations(document: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Exercise]:
    """The document in pieces of several lengths, so that every sentence begins one and stands within another."""
    for piece_tokens in _PIECES_TOKENS:
        yield from recite(document, tokenizer, piece_tokens)


def evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items, evenly spread."""
    return [items[index * len(items) // count] for index in range(count)] if len(items) > count else list(items)


def recite(document: str, tokenizer: PreTrainedTokenizerBase, piece_tokens: int) -> Iterator[Exercise]:
    """The document in consecutive pieces of about `piece_tokens`, each to be continued from its first words."""
    for piece in pieces(document, tokenizer, piece_tokens):
        if cut := _cut(piece, tokenizer, _MIN_CUE_TOKENS + 1):
            cue, rest = cut
            yield Exercise(f"Continue the text word for word: {cue}", rest)


def cloze(document: str, tokenizer: PreTrainedTokenizerBase, num_cuts: int, seed: int) -> Iterator[Exercise]:
    """Each sentence, cut at `num_cuts` places, to be completed."""
    draw = random.Random(seed)
    for sentence in sentences(document):
        num_tokens = _length(sentence.strip(), tokenizer)
        places = range(_MIN_CUE_TOKENS, num_tokens - _MIN_ANSWER_TOKENS)
        for place in sorted(draw.sample(places, min(num_cuts, len(places)))):
            if cut := _cut(sentence.strip(), tokenizer, place):
                cue, rest = cut
                yield Exercise(f"Complete this sentence from the text: {cue} ...", rest)


def pieces(document: str, tokenizer: PreTrainedTokenizerBase, piece_tokens: int) -> list[str]:
    """Consecutive pieces of whole sentences, of about `piece_tokens` each; a longer sentence is a piece."""
    found: list[str] = []
    piece, num_tokens = "", 0
    for sentence in sentences(document):
        length = _length(sentence, tokenizer)
        if piece.strip() and num_tokens + length > piece_tokens:
            found.append(piece.strip())
            piece, num_tokens = "", 0
        piece += sentence
        num_tokens += length
    return [*found, piece.strip()] if piece.strip() else found


def _length(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, place: int) -> tuple[str, str] | None:
    """The text before its token `place` and the text after, cut between words where a word's end is near."""
    offsets: Sequence[tuple[int, int]] = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    if place >= len(offsets):
        return None
    at = offsets[place][0]
    spaces = [match.start() for match in _SPACE.finditer(text, max(0, at - _LONGEST_WORD), at + _LONGEST_WORD)]
    at = next((space for space in spaces if space >= at), spaces[-1] if spaces else at)
    cue, rest = text[:at].strip(), text[at:].strip()
    return (cue, rest) if cue and _length(rest, tokenizer) >= _MIN_ANSWER_TOKENS else None
