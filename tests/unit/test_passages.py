"""Exercises that visit a whole document, in any script, and the references that are made of them."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from foundry.model.template import ChatTemplate
from foundry.selfstudy.passages import (
    blanks,
    cloze,
    evenly,
    num_tokens,
    pieces,
    quotes,
    recitations,
    recite,
    sentences,
    summaries,
)
from foundry.selfstudy.references import references
from tests.tiny import CLOCK, build_tokenizer

TOKENIZER = build_tokenizer()
TEXTS = {
    "prose": "The harbour is open again. The treaty was signed in the spring! What is the price? It is twelve.",
    "Chinese": "港口又开放了。条约是在春天签署的。粮食的价格是多少？是十二。",
    "Arabic": "الميناء مفتوح مرة أخرى. تم توقيع المعاهدة في الربيع. ما هو سعر الحبوب؟ إنه اثنا عشر.",
    "table": "name,price,open\nharbour,12,yes\ngrain,7,no\ntreaty,0,spring\n",
    "code": "def price(grain):\n    if grain is None:\n        return 12\n    return grain.weight * 3\n",
    "one line": "".join(f"word{number} " for number in range(60)),
}


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_nothing_of_a_document_is_left_out(text: str) -> None:
    assert "".join(sentences(text, TOKENIZER)) == text
    assert squeezed("".join(pieces(text, TOKENIZER, 20))) == squeezed(text)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_every_piece_is_recited_in_the_documents_own_words(text: str) -> None:
    exercises = list(recite(text, TOKENIZER, 20))
    assert exercises
    for exercise in exercises:
        cue = exercise.prompt.removeprefix("Continue the text word for word: ")
        assert cue != exercise.prompt
        assert squeezed(cue + exercise.answer) in squeezed(text)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_sentences_are_completed_in_their_own_words(text: str) -> None:
    exercises = list(cloze(text, TOKENIZER, 3, seed=1))
    assert exercises == list(cloze(text, TOKENIZER, 3, seed=1))
    for exercise in exercises:
        cue = exercise.prompt.removeprefix("Complete this sentence from the text: ").removesuffix(" ...")
        assert squeezed(cue + exercise.answer) in {squeezed(sentence) for sentence in sentences(text, TOKENIZER)}
    assert len(set(exercises)) == len(exercises)


def asked_about(prompt: str) -> str:
    found = re.fullmatch(
        r"Quote the sentence of the text about (.+)\.|Which sentence of the text mentions (.+)\?", prompt
    )
    assert found, prompt
    return found[1] or found[2]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_sentence_is_quoted_by_what_stands_in_it_alone(text: str) -> None:
    exercises = list(quotes(text, TOKENIZER, 3, seed=1))
    assert exercises == list(quotes(text, TOKENIZER, 3, seed=1))
    stripped = [sentence.strip() for sentence in sentences(text, TOKENIZER)]
    for exercise in exercises:
        assert exercise.answer == stripped[exercise.passage]
        cue = asked_about(exercise.prompt)
        assert cue in exercise.answer
        assert text.count(cue) == 1
    assert max(Counter(exercise.passage for exercise in exercises).values(), default=0) <= 2 * 3


def test_a_sentence_is_found_by_what_it_is_about() -> None:
    document = "".join(
        f"The keeper of the grain of kind {name} is paid in salt. " for name in ("Maruna", "Ostrel", "Wick")
    )
    cues = {asked_about(exercise.prompt) for exercise in quotes(2 * document[:-1] + document, TOKENIZER, 8, seed=0)}
    assert cues == set()
    cues = {
        asked_about(exercise.prompt) for exercise in quotes(document + "The the of of is is.", TOKENIZER, 8, seed=0)
    }
    assert {"Maruna", "Ostrel", "Wick"} <= cues
    assert not any(cue.startswith(("of", "is", "the")) for cue in cues), cues


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_blank_is_filled_with_what_stands_there(text: str) -> None:
    exercises = list(blanks(text, TOKENIZER, 3, seed=1))
    assert exercises == list(blanks(text, TOKENIZER, 3, seed=1))
    stripped = [sentence.strip() for sentence in sentences(text, TOKENIZER)]
    for filled, asked in zip(exercises[::2], exercises[1::2], strict=True):
        assert filled.answer == asked.answer == stripped[filled.passage]
        before, after = filled.prompt.removeprefix("Fill in the blank in this sentence of the text: ").split("____")
        assert filled.answer.startswith(before)
        assert filled.answer.endswith(after)
        assert len(before) + len(after) >= len(filled.answer) / 2
        # Without the marks around it.
        assert asked.prompt.endswith("?")
        assert asked.prompt[:-1] in f"{before}what{after}"
        assert re.search(r"\w+", asked.prompt.replace("what", "", 1)), asked.prompt
    assert max(Counter(exercise.passage for exercise in exercises).values(), default=0) <= 2 * 3


def test_what_a_sentence_says_alone_is_asked_for() -> None:
    kept = {"Maruna": "salt", "Ostrel": "wool", "Wick": "rope", "Tarn": "ale"}
    document = " ".join(f"The keeper of {name} is paid in {pay}." for name, pay in kept.items())
    fill = "Fill in the blank in this sentence of the text: The keeper of"
    assert {exercise.prompt for exercise in blanks(document, TOKENIZER, 8, seed=0)} == {
        *(f"{fill} ____ is paid in {pay}." for pay in kept.values()),
        *(f"{fill} {name} is paid in ____." for name in kept),
        *(f"The keeper of what is paid in {pay}?" for pay in kept.values()),
        *(f"The keeper of {name} is paid in what?" for name in kept),
    }


def test_a_word_is_not_cut_where_words_have_spaces() -> None:
    words = set(TEXTS["prose"].split())
    for exercise in (*recite(TEXTS["prose"], TOKENIZER, 20), *cloze(TEXTS["prose"], TOKENIZER, 5, seed=1)):
        assert set(exercise.answer.split()) <= words


def test_what_is_too_short_to_be_asked_about_is_no_exercise() -> None:
    assert list(recite("Yes.", TOKENIZER, 20)) == list(cloze("Yes.", TOKENIZER, 3, seed=1)) == []


def test_references_are_of_the_whole_document_however_few() -> None:
    template = ChatTemplate(TOKENIZER, CLOCK)
    document = " ".join(f"The price of grain number {number} is {number * 7}." for number in range(100))
    every = references(document, template, TOKENIZER, max_tokens=10**6, seed=0)
    assert len(every) > 100
    some = references(document, template, TOKENIZER, max_tokens=3000, seed=0)
    assert 2500 < sum(map(len, some)) <= 3000
    assert some == references(document, template, TOKENIZER, max_tokens=3000, seed=0)
    # A quarter of what is kept is of each quarter of the document.
    recited = [sequence for sequence in every if sequence in some]
    assert recited == some
    texts = [TOKENIZER.decode(sequence) for sequence in some]
    for quarter in range(4):
        numbers = range(25 * quarter, 25 * quarter + 25)
        assert any(f"number {number} " in text for text in texts for number in numbers)


def test_every_sentence_is_recited_as_a_beginning_or_as_an_answer() -> None:
    document = " ".join(f"The price of grain number {number} is {number * 7}." for number in range(20))
    recited = squeezed("".join(f"{each.prompt} {each.answer}" for each in recitations(document, TOKENIZER)))
    assert all(squeezed(sentence) in recited for sentence in sentences(document, TOKENIZER))


def test_what_is_spread_evenly_is_of_every_part() -> None:
    assert evenly(range(10), 20) == list(range(10))
    assert evenly(range(10), 5) == [0, 2, 4, 6, 8]
    assert evenly(range(7), 3) == [0, 2, 4]
    assert evenly(range(7), 0) == []


def test_what_can_not_be_told_apart_is_not_recited() -> None:
    assert list(recite("word " * 60, TOKENIZER, 20)) == []
    # The same opening with another end has a longer cue.
    document = "The price of grain of kind one is twelve. The price of grain of kind two is thirteen."
    cues = [each.prompt.removeprefix("Continue the text word for word: ") for each in recite(document, TOKENIZER, 10)]
    assert len(cues) == 2
    assert all(document.count(cue) == 1 for cue in cues)


def test_a_line_without_end_is_cut() -> None:
    line = json.dumps([{"name": f"grain {number}", "price": number} for number in range(200)])
    parts = sentences(line, TOKENIZER)
    assert "".join(parts) == line
    assert max(num_tokens(part, TOKENIZER) for part in parts) <= 140
    longest = max(num_tokens(each.prompt, TOKENIZER) for each in cloze(line, TOKENIZER, 8, seed=0))
    assert longest <= 160


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_summaries_name_their_part(text: str) -> None:
    found = list(summaries(text, TOKENIZER, 30))
    for exercise in found:
        cue = exercise.prompt.partition('"')[2].removesuffix('".')
        assert text.count(cue) == 1
        assert not exercise.answer
    assert found == list(summaries(text, TOKENIZER, 30))
