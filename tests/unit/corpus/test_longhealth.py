"""LongHealth's patients: what the document says, what is asked, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foundry.corpus.longhealth import read_longhealth
from foundry.errors import DocumentUnreadable, InvalidArgument
from foundry.evaluation.questions import read_questions
from tests.unit.cli.command import foundry, refused


def question(number: int, correct: str, **values: Any) -> dict[str, Any]:
    answers = {f"answer_{letter}": f"{letter.upper()} is given" for letter in "abcde"}
    location = {"answer_location": {"text_0": {"start": [0.1], "end": [0.2]}}}
    return {"No": number, "question": "Which drug?", "correct": correct, **answers, **location, **values}


def patient(name: str, *questions: dict[str, Any]) -> dict[str, Any]:
    texts = {"text_0": f"{name} was admitted.\n", "text_1": "Discharged\nin good health."}
    return {"name": name, "birthday": "1970-01-02", "diagnosis": "DLBCL", "texts": texts, "questions": list(questions)}


PATIENTS = {
    "patient_01": patient("Anna", question(0, "B is given"), question(1, " e IS given ")),
    "patient_02": patient("Bert", question(0, "F is given"), question(1, "x", answer_a="x", answer_b="xy")),
}


def read(patients: Any, *chosen: str) -> Any:
    return read_longhealth(json.dumps(patients).encode(), chosen)


def test_texts_stand_under_their_patient() -> None:
    found = read(PATIENTS, "patient_01")
    assert found.patients == ["patient_01"]
    assert found.document == (
        "# patient_01\n\nName: Anna\nBirthday: 1970-01-02\nDiagnosis: DLBCL\n\n"
        "## text_0\n\nAnna was admitted.\n\n## text_1\n\nDischarged\nin good health.\n"
    )
    both = read(PATIENTS)
    assert both.patients == ["patient_01", "patient_02"]
    assert both.document.startswith(found.document.strip())
    assert read(PATIENTS, "patient_02", "patient_01").patients == ["patient_02", "patient_01"]


def test_questions_are_those_of_eval() -> None:
    found = read(PATIENTS)
    first, second = read_questions(found.questions, field="questions")
    assert first.expected == ("B is given",)
    assert (first.is_right("b is given."), first.is_right("C is given")) == (True, False)
    assert "About Anna (patient_01), born 1970-01-02: Which drug?\n\n- A is given\n" in first.messages[0]["content"]
    assert second.expected == ("e IS given",)
    # One whose right answer is none of the five, and one whose right answer is part of another.
    assert found.left_out == ["patient_02_0", "patient_02_1"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff{}",
        b'{"a": 1}',
        b"[" * 10**6,
        json.dumps({"p": {**PATIENTS["patient_01"], "texts": {}}}).encode(),
        json.dumps({"p": {**PATIENTS["patient_01"], "texts": ["a"]}}).encode(),
        json.dumps({"p": {**PATIENTS["patient_01"], "texts": {"t": 5}}}).encode(),
        json.dumps({"p": {**PATIENTS["patient_01"], "questions": 5}}).encode(),
        json.dumps({"p": {**PATIENTS["patient_01"], "questions": [{"question": "a"}]}}).encode(),
        json.dumps({"p": {**PATIENTS["patient_01"], "name": None}}).encode(),
    ],
)
def test_what_is_no_such_file_is_refused(content: bytes) -> None:
    with pytest.raises(DocumentUnreadable, match="no file of LongHealth's"):
        read_longhealth(content)


def test_a_patient_must_be_there() -> None:
    with pytest.raises(InvalidArgument, match="there is no patient 'patient_03': patient_01, patient_02"):
        read(PATIENTS, "patient_03")


def test_the_command_writes_both_and_over_nothing(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(json.dumps(PATIENTS))
    arguments = ("documents", "longhealth", str(tmp_path / "b.json"), str(tmp_path / "out"))
    result = foundry(*arguments, "--patient", "patient_01")
    assert result.exit_code == 0, result.output
    assert "1 patients and 2 questions" in result.stderr
    assert (tmp_path / "out" / "document.md").read_text() == read(PATIENTS, "patient_01").document
    assert len(read_questions((tmp_path / "out" / "questions.jsonl").read_text(), field="questions")) == 2
    assert "is there already" in refused(*arguments)
    assert "can't be read" in refused("documents", "longhealth", str(tmp_path / "absent.json"), str(tmp_path))
