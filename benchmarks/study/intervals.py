"""How sure a figure is that a few questions and seeds gave: the percentile bootstrap over both.

Of each document the questions are drawn anew, with replacement, the same ones for every seed, and so are the seeds; the
documents are what they are. Shape suffixes: R resamples, S seeds, Q questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_NUM_RESAMPLES = 4000
_PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class Measurement:
    """Of one document: what each question gave with each seed, and how much each question weighs.

    Its figure is the mean over seeds of sum(totals) / sum(weights).
    """

    totals_SQ: Array
    weights_Q: Array


@dataclass(frozen=True, slots=True)
class Interval:
    value: float
    low: float
    high: float


def interval(by_document: Sequence[Measurement], minus: Sequence[Measurement] = ()) -> Interval:
    """The mean of the documents' figures and its 95 % interval; or how much it is above that of `minus`.

    A difference is paired where both have the same documents, questions and seeds: both are drawn alike.
    """
    value, values_R = _mean(by_document)
    if minus:
        less, less_R = _mean(minus)
        value, values_R = value - less, values_R - less_R
    low, high = np.percentile(values_R, _PERCENTILES)
    return Interval(value, float(low), float(high))


def _mean(by_document: Sequence[Measurement]) -> tuple[float, Array]:
    values = [_value(each.totals_SQ.mean(0), each.weights_Q) for each in by_document]
    resampled = [_resampled(each, seed) for seed, each in enumerate(by_document)]
    return float(np.mean(values)), np.mean(resampled, axis=0)


def _value(totals_Q: Array, weights_Q: Array) -> float:
    return float(totals_Q.sum() / weights_Q.sum())


def _resampled(measurement: Measurement, seed: int) -> Array:
    """The figure [R]. Whatever has as many questions and seeds is drawn alike."""
    num_seeds, num_questions = measurement.totals_SQ.shape
    draw = np.random.default_rng(seed)
    times_RQ = draw.multinomial(num_questions, np.full(num_questions, 1 / num_questions), size=_NUM_RESAMPLES)
    times_RS = draw.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=_NUM_RESAMPLES) / num_seeds
    totals_R = (times_RS @ measurement.totals_SQ * times_RQ).sum(axis=1)
    figures_R: Array = totals_R / (times_RQ @ measurement.weights_Q)
    return figures_R
