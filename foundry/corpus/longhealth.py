"""LongHealth's patients (https://github.com/kbressem/LongHealth): a document, and questions for `foundry eval`.

The file is an object of patients by their ids, each with `name`, `birthday`, `diagnosis`, `texts` by id, and
`questions` with five answers each, of which `correct` repeats the right one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foundry.errors import DocumentUnreadable, InvalidArgument
from foundry.untrusted import parse_json

# Of the whole file; the published one has two.
MAX_BYTES = 64 * 2**20
_ANSWERS = ("answer_a", "answer_b", "answer_c", "answer_d", "answer_e")
_ABOUT = ("name", "birthday", "diagnosis")


@dataclass(frozen=True, slots=True)
class LongHealth:
    """`questions` are JSON lines {prompt, expected, id}; `left_out` are ids of those without one right answer."""

    patients: list[str]
    document: str
    questions: str
    left_out: list[str]


def read_longhealth(content: bytes, patients: Sequence[str] = ()) -> LongHealth:
    """Of these patients in this order, or of all in the file's.

    Raises DocumentUnreadable for what is no such file, InvalidArgument for a patient that is not in it.
    """
    try:
        found = parse_json(content, max_bytes=MAX_BYTES)
    except InvalidArgument as error:
        raise _unreadable(error.message) from error
    if not isinstance(found, dict) or not found:
        raise _unreadable("it is no object of patients")
    chosen = list(dict.fromkeys(patients)) or list(found)
    for patient in chosen:
        if patient not in found:
            raise InvalidArgument(f"there is no patient {patient!r:.100}: {', '.join(found):.500}", field="patient")
    parts, lines, left_out = [], [], list[str]()
    for patient in chosen:
        parts.append("\n\n".join(_document(patient, _object(found[patient], patient))))
        for question_id, line in _questions(patient, found[patient]):
            if line is None:
                left_out.append(question_id)
            else:
                lines.append(json.dumps({**line, "id": question_id}, ensure_ascii=False))
    return LongHealth(chosen, "\n\n".join(parts) + "\n", "".join(f"{line}\n" for line in lines), left_out)


def _document(patient: str, values: Mapping[str, Any]) -> Iterator[str]:
    yield f"# {_line(patient, 'its id')}"
    yield "\n".join(f"{name.capitalize()}: {_line(values.get(name), f'{patient}.{name}')}" for name in _ABOUT)
    texts = _object(values.get("texts"), f"{patient}.texts")
    if not texts:
        raise _unreadable(f"{patient} has no texts")
    for text_id, text in texts.items():
        yield f"## {_line(text_id, f'{patient}.texts')}"
        yield _text(text, f"{patient}.texts.{text_id}").strip()


def _questions(patient: str, values: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Ids and lines; None where the right answer is not one of the five, or not told from another."""
    asked = values.get("questions", [])
    if not isinstance(asked, list):
        raise _unreadable(f"{patient}.questions is no list")
    for number, each in enumerate(asked):
        where = f"{patient}.questions.{number}"
        question = _object(each, where)
        answers = [_text(question.get(name), f"{where}.{name}").strip() for name in _ANSWERS]
        correct = _text(question.get("correct"), f"{where}.correct").strip()
        known = [answer.casefold() for answer in answers]
        # A right one that is part of another would be found in a wrong answer.
        clear = bool(correct) and known.count(correct.casefold()) == 1
        clear = clear and sum(correct.casefold() in answer for answer in known) == 1
        yield (
            f"{patient}_{question.get('No', number)}",
            _line_of(patient, values, question, answers, correct) if clear else None,
        )


def _line_of(
    patient: str, values: Mapping[str, Any], question: Mapping[str, Any], answers: Sequence[str], correct: str
) -> dict[str, Any]:
    asked = _text(question.get("question"), f"{patient}: a question").strip()
    who = f"{values.get('name')} ({patient}), born {values.get('birthday')}"
    options = "\n".join(f"- {answer}" for answer in answers)
    prompt = f"About {who}: {asked}\n\n{options}\n\nRepeat the one answer that is right, and nothing else."
    return {"prompt": prompt, "expected": [correct]}


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _unreadable(f"{where} is no object")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _unreadable(f"{where} is no text")
    return value


def _line(value: Any, where: str) -> str:
    """What stands in a heading or a row of its own."""
    return " ".join(_text(value, where).split())


def _unreadable(why: str) -> DocumentUnreadable:
    return DocumentUnreadable(f"this is no file of LongHealth's: {why}", field="file")
