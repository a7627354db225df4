"""The study's documents, each with the questions that it is judged by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from foundry.selfstudy.wording import normalised

DOCUMENTS = Path(__file__).parent / "documents"
HANDBOOK = Path(__file__).parents[2] / "examples" / "handbook.md"
# Which questions the model answers with the whole document before it: `benchmarks.study.answerable` writes it.
ANSWERABLE = Path(__file__).parents[1] / "results" / "answerable.json"
# No recipe was chosen by what cartridges of it answer: it is for the last check, and used only where it is named.
FINAL = "brindlewick-theatre"
# Of an answer that is judged.
MAX_NEW_TOKENS = 24
# A beginning of the handbook, for a look at whether everything runs.
SMOKE = "smoke"
_SMOKE_CHARACTERS, _SMOKE_QUESTIONS = 700, 4


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation that ends with a question about one fact, and the strings of which an answer must hold one."""

    messages: Sequence[dict[str, str]]
    expected: Sequence[str]

    @property
    def text(self) -> str:
        return self.messages[-1]["content"]

    def is_right(self, answer: str) -> bool:
        return any(each.lower() in answer.lower() for each in self.expected)


@dataclass(frozen=True)
class StudyDocument:
    name: str
    text: str
    questions: Sequence[Question]
    # Of each question: whether the model answers it right with the whole document before it, and not without.
    answerable: Sequence[bool]

    @cached_property
    def held(self) -> frozenset[str]:
        """The wordings that nothing may be trained on."""
        return frozenset(normalised(question.text) for question in self.questions)


def read_questions(path: Path) -> list[Question]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [Question(line["prompt"], line["expected"]) for line in lines]


def documents() -> dict[str, Path]:
    """The handbook of the examples and the study's own that recipes are chosen by, by name, the shortest first."""
    return {name: path for name, path in every_document().items() if name != FINAL}


def every_document() -> dict[str, Path]:
    """`documents`, and `FINAL` among them."""
    return {
        path.stem: path for path in sorted([HANDBOOK, *DOCUMENTS.glob("*.md")], key=lambda path: path.stat().st_size)
    }


def read_document(name: str) -> StudyDocument:
    """One of `every_document`, or the beginning of the handbook that is called `smoke`."""
    if name == SMOKE:
        return _smoke()
    rows = json.loads(ANSWERABLE.read_text())[name]["questions"]
    makes_the_difference = {row["question"]: row["right_with_document"] and not row["right_without"] for row in rows}
    questions = read_questions(DOCUMENTS / f"{name}.questions.jsonl")
    answerable = [makes_the_difference[question.text] for question in questions]
    return StudyDocument(name, every_document()[name].read_text(), questions, answerable)


def _smoke() -> StudyDocument:
    whole = read_document(HANDBOOK.stem)
    text = whole.text[:_SMOKE_CHARACTERS].rpartition("\n")[0]
    pairs = zip(whole.questions, whole.answerable, strict=True)
    chosen = [(question, known) for question, known in pairs if question.is_right(text)][:_SMOKE_QUESTIONS]
    return StudyDocument(SMOKE, text, [question for question, _ in chosen], [known for _, known in chosen])
