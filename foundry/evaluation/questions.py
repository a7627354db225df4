"""Questions that a cartridge is judged by, and what makes an answer right."""

from __future__ import annotations

from dataclasses import dataclass

from foundry.errors import InvalidArgument
from foundry.selfstudy.prompts import Line, read_lines

MAX_QUESTIONS = 10_000


@dataclass(frozen=True, slots=True)
class Question:
    messages: list[dict[str, str]]
    # Empty where no answer is right or wrong: such a question counts for the KL alone.
    expected: tuple[str, ...] = ()

    def is_right(self, answer: str) -> bool | None:
        """Whether any expected string occurs in the answer, in upper or lower case; None where nothing is expected."""
        if not self.expected:
            return None
        return any(expected.casefold() in answer.casefold() for expected in self.expected)


def read_questions(text: str, *, field: str) -> list[Question]:
    """One of each line: {"prompt": "…" or [{role, content}, …], "expected": ["…", …]}; other keys are ignored.

    Raises InvalidArgument that names the line, and `field` as what was wrong.
    """
    lines = read_lines(text, field=field, most=MAX_QUESTIONS)
    return [Question(line.messages, _expected(line, field)) for line in lines]


def _expected(line: Line, field: str) -> tuple[str, ...]:
    expected = line.row.get("expected", [])
    # The empty string occurs in every answer.
    if not isinstance(expected, list) or not all(isinstance(each, str) and each.strip() for each in expected):
        raise InvalidArgument(f'{line.where} has an "expected" that is not a list of texts with words', field=field)
    return tuple(expected)
