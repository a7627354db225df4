"""What the study measured, as one file has it, and how it is looked up: by job, at an amount of tokens or seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.study.document import FINAL
from benchmarks.study.grid import Cell
from benchmarks.study.intervals import Array, Measurement
from benchmarks.study.job import Job

Axis = Literal["answer_tokens", "seconds"]
# Divergence; right answers among those questions that the model answers with the document; and among all.
Quantity = Literal["kl", "answerable", "right"]
_ABOUT = ("device", "dtype", "torch", "model")
_OF_DOCUMENT = ("context_tokens", "answer_tokens", "answerable", "teacher_right")
_OF_JOB = ("job", "num_tokens", "marks", "workers", "seconds")


@dataclass(frozen=True, slots=True)
class Result:
    """One job. `document` is what results say of its questions."""

    job: Job
    num_tokens: int
    marks: list[dict[str, Any]]
    document: dict[str, Any]

    def along(self, axis: Axis) -> Array:
        """Where on the axis each mark stands."""
        if axis == "seconds":
            return np.array([sum(mark["seconds"].values()) for mark in self.marks], dtype=np.float64)
        return np.array([mark["answer_tokens"] for mark in self.marks], dtype=np.float64)

    def totals(self, quantity: Quantity, axis: Axis, at: float) -> Array:
        """Of each question [Q] at a place on the axis, between two marks in proportion; beyond the last, what it ends
        with."""
        marks_MQ = np.stack([self._totals(mark, quantity) for mark in self.marks])
        places_M = self.along(axis)
        after = min(int(np.searchsorted(places_M, at)), len(places_M) - 1)
        if after == 0:
            return marks_MQ[0]
        share = min(1.0, (at - places_M[after - 1]) / (places_M[after] - places_M[after - 1]))
        between: Array = (1 - share) * marks_MQ[after - 1] + share * marks_MQ[after]
        return between

    def weights(self, quantity: Quantity) -> Array:
        if quantity == "kl":
            return np.array(self.document["answer_tokens"], dtype=np.float64)
        return self._answerable if quantity == "answerable" else np.ones_like(self._answerable)

    @property
    def _answerable(self) -> Array:
        return flags(self.document["answerable"])

    def _totals(self, mark: dict[str, Any], quantity: Quantity) -> Array:
        if quantity == "kl":
            return np.array(mark["kl_millinats"], dtype=np.float64) / 1000
        return flags(mark["right"]) * self.weights(quantity)


@dataclass(frozen=True, slots=True)
class Study:
    about: list[dict[str, Any]]
    documents: dict[str, dict[str, Any]]
    results: dict[Job, Result]
    rows: list[dict[str, Any]]

    @classmethod
    def gather(cls, directory: Path) -> Study:
        """Of the files that `benchmarks.study.grid` wrote. Raises ValueError if they don't belong together."""
        found = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
        found.sort(key=lambda each: json.dumps(each["job"], sort_keys=True))
        documents: dict[str, dict[str, Any]] = {}
        for each in found:
            of_document = {key: each[key] for key in _OF_DOCUMENT}
            if documents.setdefault(each["job"]["document"], of_document) != of_document:
                raise ValueError(
                    f"results on {each['job']['document']} were measured along different answers of the teacher and "
                    f"can't be compared: jobs that share {directory / 'cache'} can"
                )
        about = {json.dumps({key: each[key] for key in _ABOUT}): None for each in found}
        return cls.of_rows(
            [json.loads(each) for each in about], documents, [{key: each[key] for key in _OF_JOB} for each in found]
        )

    @classmethod
    def read(cls, path: Path) -> Study:
        content = json.loads(path.read_text())
        return cls.of_rows(content["about"], content["documents"], content["jobs"])

    def write(self, path: Path) -> None:
        """A job a line."""
        lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in self.rows)
        documents = json.dumps(self.documents, separators=(",", ":"))
        path.write_text(f'{{"about":{json.dumps(self.about)},\n"documents":{documents},\n"jobs":[\n{lines}\n]}}\n')

    @classmethod
    def of_rows(cls, about: list[dict[str, Any]], documents: dict[str, Any], rows: list[dict[str, Any]]) -> Study:
        """Of what `write` has in its three parts."""
        results = {}
        for row in rows:
            job = Job.from_json(row["job"])
            results[job] = Result(job, row["num_tokens"], row["marks"], documents[job.document])
        return cls(about, dict(sorted(documents.items(), key=lambda each: each[1]["context_tokens"])), results, rows)

    @property
    def seeds(self) -> list[int]:
        return sorted({job.seed for job in self.results})

    def of(self, cell: Cell, *, final: bool = False) -> dict[str, list[Result]]:
        """By document what there is of a cell, a seed each; documents of which there is nothing are left out. The one
        that no recipe was chosen by stands alone: it is `final`."""
        found = {
            name: [self.results[job] for job in cell.jobs([name], self.seeds) if job in self.results]
            for name in self.documents
            if (name == FINAL) == final
        }
        return {name: results for name, results in found.items() if results}


def measurements(
    by_document: dict[str, list[Result]], quantity: Quantity, axis: Axis = "answer_tokens", at: float = float("inf")
) -> list[Measurement]:
    """What a cell has at a place on the axis, by default at its end."""
    found = []
    for results in by_document.values():
        weights_Q = results[0].weights(quantity)
        # What does not count is not drawn either.
        counts_Q = weights_Q > 0
        totals_SQ = np.stack([result.totals(quantity, axis, at) for result in results])
        found.append(Measurement(totals_SQ[:, counts_Q], weights_Q[counts_Q]))
    return found


def flags(text: str) -> Array:
    return np.array([float(each) for each in text], dtype=np.float64)


def paired(cells: Sequence[dict[str, list[Result]]]) -> list[dict[str, list[Result]]]:
    """Of each cell only the documents and seeds that all of them have."""
    common = set.intersection(
        *({(name, each.job.seed) for name, results in cell.items() for each in results} for cell in cells)
    )
    kept = [
        {name: [each for each in results if (name, each.job.seed) in common] for name, results in cell.items()}
        for cell in cells
    ]
    return [{name: results for name, results in cell.items() if results} for cell in kept]
