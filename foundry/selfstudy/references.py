"""Turns with answers that show how a document is read: what a cartridge's start is fitted to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from foundry.model.template import ChatTemplate
from foundry.selfstudy.passages import Exercise, blanks, cloze, evenly, recite

_RECITED_TOKENS = 40
# Of each sentence; more only repeat what the first ones show.
_CLOZE_CUTS, _BLANKS = 2, 2
# Of a turn with its answer.
_LEAST_TOKENS = 16


def references(
    document: str, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, seed: int
) -> list[list[int]]:
    """Token ids of turns and their answers, `max_tokens` in all at the most, about every part of the document.

    The whole document recited comes first, then its sentences to be completed, at their ends or within. Where that is
    more than `max_tokens`, evenly many of all parts are left out. The answers are the document's own words, so nothing
    is decoded.
    """
    found: list[list[int]] = []
    incomplete = [*cloze(document, tokenizer, _CLOZE_CUTS, seed), *blanks(document, tokenizer, _BLANKS, seed)]
    incomplete.sort(key=lambda exercise: exercise.passage)
    for exercises in (recite(document, tokenizer, _RECITED_TOKENS), incomplete):
        room = max_tokens - sum(map(len, found))
        # No more than could fit, since rendering a turn takes far longer than thinking of it.
        candidates = evenly(list(exercises), room // _LEAST_TOKENS)
        found += _thinned([_ids(exercise, template) for exercise in candidates], room)
    return found


def _ids(exercise: Exercise, template: ChatTemplate) -> list[int]:
    turn = template.turn([{"role": "user", "content": exercise.prompt}])
    return [*turn, *template.text(exercise.answer)]


def _thinned(sequences: Sequence[list[int]], max_tokens: int) -> Iterator[list[int]]:
    """Every sequence, or evenly spread ones whose tokens fit."""
    total = sum(map(len, sequences))
    kept_tokens = passed_tokens = 0
    for sequence in sequences:
        passed_tokens += len(sequence)
        # As much of what has passed as of all.
        if total <= max_tokens or kept_tokens + len(sequence) <= passed_tokens / total * max_tokens:
            kept_tokens += len(sequence)
            yield sequence
