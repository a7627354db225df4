"""Exercises that visit every sentence of a document: say it on, word for word, or complete it.

Their answers can be the document's own words, so they need no decoding. They are made without knowing the language:
what is cut is cut between tokens.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from foundry.seeds import derive_seed

T = TypeVar("T")

# A sentence with the white space after it; lines end sentences too. Some scripts have marks, and spaces, of their own.
_SENTENCE = re.compile(r".+?(?:[.!?…؟।]+[\"'”’)\]]*\s+|[。！？]+[」』”]*\s*|\n+|$)", re.DOTALL)
_SPACE = re.compile(r"\s")
# In characters. What has no space for so long is of a script that has none.
_LONGEST_WORD = 24
_LONGEST_SENTENCE_TOKENS = 128
_PIECES_TOKENS = (22, 28, 34, 40, 46, 52)
# Families whose answers are the document's own words; those of all others are the model's.
VERBATIM = ("recite", "quote", "blank", "evidence")
# Of each sentence.
_CLOZE_CUTS = 16
_CUES = 8
_BLANKS = 8
_QUOTE = ("Quote the sentence of the text about {}.", "Which sentence of the text mentions {}?")
# A blank is the one thing that such a sentence does not say, and so what a question would ask for.
_FILL, _BLANK, _WHAT = "Fill in the blank in this sentence of the text:", "____", "what"
# Scripts without spaces have pieces of sentences for words. Marks around one are not part of it.
_WORD = re.compile(rf"\S{{1,{_LONGEST_WORD}}}")
_MARKS = " .,;:!?()[]{}\"'`*#|-–—“”‘’"
# Times that a document has a word that tells what a sentence is about; the length of a cue in words and characters.
_SELDOM, _MAX_CUE_WORDS, _MIN_CUE = 3, 4, 4
# Shorter ones say too little to be found again.
_MIN_CUE_TOKENS = 4
_MIN_ANSWER_TOKENS = 3


@dataclass(frozen=True, slots=True)
class Exercise:
    """What is asked about a passage of a document."""

    prompt: str
    # The document's own words for it; none where only a model can answer.
    answer: str
    # Which passage of its kind, and how many tokens that has.
    passage: int
    passage_tokens: int


def sentences(document: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The document in order, nothing left out. What is no prose has sentences without end: they are cut."""
    return [part for sentence in _SENTENCE.findall(document) for part in _parts(sentence, tokenizer)]


def _parts(sentence: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    # A token has at least one character's byte, so most need no counting.
    if len(sentence) <= _LONGEST_SENTENCE_TOKENS:
        return [sentence]
    offsets = tokenizer(sentence, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    begins = [offset for offset, _ in offsets[::_LONGEST_SENTENCE_TOKENS]]
    return [sentence[begin:end] for begin, end in zip([0, *begins[1:]], [*begins[1:], len(sentence)], strict=True)]


def recitations(document: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Exercise]:
    """The document in pieces of several lengths, so that every sentence begins one and stands within another."""
    for piece_tokens in _PIECES_TOKENS:
        yield from recite(document, tokenizer, piece_tokens)


def evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items, evenly spread."""
    return [items[index * len(items) // count] for index in range(count)] if len(items) > count else list(items)


def recite(document: str, tokenizer: PreTrainedTokenizerBase, piece_tokens: int) -> Iterator[Exercise]:
    """The document in consecutive pieces of about `piece_tokens`, each to be continued from its first words."""
    for place, piece in enumerate(pieces(document, tokenizer, piece_tokens)):
        length = num_tokens(piece, tokenizer)
        if cut := _cut_where_it_is_known(document, piece, tokenizer, range(_MIN_CUE_TOKENS + 1, length)):
            cue, rest = cut
            yield Exercise(f"Continue the text word for word: {cue}", rest, place, length)


def cloze(document: str, tokenizer: PreTrainedTokenizerBase, num_cuts: int, seed: int) -> Iterator[Exercise]:
    """Each sentence, cut at `num_cuts` places, to be completed."""
    draw = random.Random(seed)
    for number, sentence in enumerate(map(str.strip, sentences(document, tokenizer))):
        length = num_tokens(sentence, tokenizer)
        places = range(_MIN_CUE_TOKENS, length - _MIN_ANSWER_TOKENS)
        cuts = (_cut(sentence, tokenizer, place) for place in sorted(draw.sample(places, min(num_cuts, len(places)))))
        # Places within a word are one cut.
        for cue, rest in dict.fromkeys(cut for cut in cuts if cut):
            yield Exercise(f"Complete this sentence from the text: {cue} ...", rest, number, length)


def summaries(document: str, tokenizer: PreTrainedTokenizerBase, piece_tokens: int) -> Iterator[Exercise]:
    """Each piece of about `piece_tokens`, named by its first words, to be summed up."""
    for place, piece in enumerate(pieces(document, tokenizer, piece_tokens)):
        length = num_tokens(piece, tokenizer)
        if cut := _cut_where_it_is_known(document, piece, tokenizer, range(2 * _MIN_CUE_TOKENS, length)):
            cue, _ = cut
            yield Exercise(f'Summarize the part of the text that begins with "{cue}".', "", place, length)


def quotes(document: str, tokenizer: PreTrainedTokenizerBase, num_cues: int, seed: int) -> Iterator[Exercise]:
    """Each sentence, to be found by at most `num_cues` of the things that are said nowhere else: names, numbers."""
    draw = random.Random(seed)
    times = _word_counts(document)
    for number, sentence in enumerate(map(str.strip, sentences(document, tokenizer))):
        length = num_tokens(sentence, tokenizer)
        cues = [cue for cue in _cues(sentence, times) if document.count(cue) == 1]
        for cue in draw.sample(cues, min(num_cues, len(cues))):
            # Their order is drawn too: data sets of this format are.
            for wording in draw.sample(_QUOTE, len(_QUOTE)):
                yield Exercise(wording.format(cue), sentence, number, length)


def blanks(document: str, tokenizer: PreTrainedTokenizerBase, num_blanks: int, seed: int) -> Iterator[Exercise]:
    """Each sentence without one of its seldom runs of words, at most `num_blanks` of them, to be said whole."""
    draw = random.Random(seed)
    times = _word_counts(document)
    for number, sentence in enumerate(map(str.strip, sentences(document, tokenizer))):
        length = num_tokens(sentence, tokenizer)
        runs = [run for run in _seldom_runs(sentence, times) if len(run) <= len(sentence) / 2]
        for run in draw.sample(runs, min(num_blanks, len(runs))):
            before, after = sentence[: run.start], sentence[run.stop :]
            yield Exercise(f"{_FILL} {before}{_BLANK}{after}", sentence, number, length)
            yield Exercise(f"{before}{_WHAT}{after}".strip(_MARKS) + "?", sentence, number, length)


def _cues(sentence: str, times: Counter[str]) -> list[str]:
    """What a sentence can be asked for by. All of it is no question."""
    found = (sentence[run.start : run.stop] for run in _seldom_runs(sentence, times))
    return list(dict.fromkeys(cue for cue in found if _MIN_CUE <= len(cue) <= len(sentence) / 2))


def _seldom_runs(sentence: str, times: Counter[str]) -> Iterator[range]:
    """Where words in a row stand that are all seldom, without the marks around them: those that are everywhere say
    nothing of what a sentence is about."""
    words = list(_WORD.finditer(sentence))
    for begin in range(len(words)):
        for end in range(begin + 1, min(begin + _MAX_CUE_WORDS, len(words)) + 1):
            if times[_bare(words[end - 1][0])] > _SELDOM:
                break
            run = sentence[words[begin].start() : words[end - 1].end()]
            if bare := run.strip(_MARKS):
                start = words[begin].start() + len(run) - len(run.lstrip(_MARKS))
                yield range(start, start + len(bare))


def _word_counts(document: str) -> Counter[str]:
    return Counter(map(_bare, _WORD.findall(document)))


def _bare(word: str) -> str:
    return word.strip(_MARKS).casefold()


def exercises(
    family: str, document: str, tokenizer: PreTrainedTokenizerBase, *, seed: int, passage_tokens: int
) -> Iterator[Exercise]:
    """All of a family that is made of the document alone, in its order. What is drawn is drawn by `seed`; what is
    summed up has about `passage_tokens`."""
    if family == "recite":
        return recitations(document, tokenizer)
    if family == "quote":
        return quotes(document, tokenizer, _CUES, derive_seed(seed, family))
    if family == "blank":
        return blanks(document, tokenizer, _BLANKS, derive_seed(seed, family))
    if family == "cloze":
        return cloze(document, tokenizer, _CLOZE_CUTS, derive_seed(seed, family))
    if family == "summary":
        return summaries(document, tokenizer, passage_tokens)
    raise ValueError(f"{family} is no family of exercises")


def pieces(document: str, tokenizer: PreTrainedTokenizerBase, piece_tokens: int) -> list[str]:
    """Consecutive pieces of whole sentences, of about `piece_tokens` each; a longer one is a piece."""
    found: list[str] = []
    piece, total = "", 0
    for sentence in sentences(document, tokenizer):
        length = num_tokens(sentence, tokenizer)
        if piece.strip() and total + length > piece_tokens:
            found.append(piece.strip())
            piece, total = "", 0
        piece += sentence
        total += length
    return [*found, piece.strip()] if piece.strip() else found


def num_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _cut_where_it_is_known(
    document: str, piece: str, tokenizer: PreTrainedTokenizerBase, places: range
) -> tuple[str, str] | None:
    """A piece after its shortest beginning that stands in the document once: after any other, what is to follow?"""
    cuts = (_cut(piece, tokenizer, place) for place in places[::_MIN_CUE_TOKENS])
    return next((cut for cut in cuts if cut and document.count(cut[0]) == 1), None)


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
    return (cue, rest) if cue and num_tokens(rest, tokenizer) >= _MIN_ANSWER_TOKENS else None
