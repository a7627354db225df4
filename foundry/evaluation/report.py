"""All that was measured, and the figures with their intervals, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from foundry.client import ChatAnswer
from foundry.evaluation.questions import Question
from foundry.evaluation.statistics import NUM_RESAMPLES, Ratio, estimate
from foundry.evaluation.systems import Comparison, System

if TYPE_CHECKING:
    from foundry.evaluation.divergence import Divergence

Json = dict[str, Any]
_ABOUT_VERSION = ("name", "version", "digest", "run", "step", "document")


@dataclass(frozen=True, slots=True)
class Measured:
    """A system's answers to the questions, in their order, and its divergences, none where they were not measured."""

    system: System
    answers: Sequence[ChatAnswer]
    divergences: Sequence[Divergence]


def report(comparison: Comparison, questions: Sequence[Question], measured: Sequence[Measured]) -> Json:
    """Every figure is null where nothing was expected, or no KL was measured; KLs are in nats."""
    by_system = {each.system: each for each in measured}
    version = by_system[comparison.version]
    return {
        "cartridge": {key: value for key, value in comparison.manifest.items() if key in _ABOUT_VERSION},
        "model_fingerprint": comparison.model_fingerprint,
        "intervals": {"level": 0.95, "resamples": NUM_RESAMPLES},
        "systems": [_system(comparison, questions, each) for each in measured],
        "differences": [
            {
                "system": version.system.label,
                "minus": baseline.label,
                "right": _estimate(_right(questions, version), _right(questions, by_system[baseline])),
                "kl": _estimate(_kl(version), _kl(by_system[baseline])),
            }
            for baseline in comparison.baselines
        ],
        "questions": [asdict(question) for question in questions],
    }


def _system(comparison: Comparison, questions: Sequence[Question], measured: Measured) -> Json:
    answers, right = measured.answers, _right(questions, measured)
    divergences: list[Divergence | None] = [*measured.divergences] or [None] * len(answers)
    return {
        "system": measured.system.label,
        "model": measured.system.model,
        "held_tokens": comparison.num_held_tokens(answers[0]),
        "num_right": None if right is None else int(sum(right.totals)),
        "num_expected": None if right is None else len(right.totals),
        "right": _estimate(right),
        "first_token_seconds": median(answer.seconds_to_first_token for answer in answers),
        "kl": _estimate(_kl(measured)),
        "questions": [
            {
                "answer": answer.text,
                "right": question.is_right(answer.text),
                "first_token_seconds": answer.seconds_to_first_token,
                "kl": None if divergence is None else asdict(divergence),
            }
            for question, answer, divergence in zip(questions, answers, divergences, strict=True)
        ],
    }


def _right(questions: Sequence[Question], measured: Measured) -> Ratio | None:
    judged = [question.is_right(answer.text) for question, answer in zip(questions, measured.answers, strict=True)]
    rights = [float(right) for right in judged if right is not None]
    return Ratio(rights, [1.0] * len(rights)) if rights else None


def _kl(measured: Measured) -> Ratio | None:
    found = measured.divergences
    return Ratio([each.kl_sum for each in found], [each.num_tokens for each in found]) if found else None


def _estimate(ratio: Ratio | None, *minus: Ratio | None) -> Json | None:
    return None if ratio is None else asdict(estimate(ratio, *minus))
