"""How sure a figure is that a few questions gave: the percentile bootstrap, Efron 1979.

https://doi.org/10.1214/aos/1176344552
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 10_000
_PERCENTILES = (2.5, 97.5)
# One for all: whatever has as many questions is resampled by the same draws.
_SEED = 0


@dataclass(frozen=True, slots=True)
class Ratio:
    """sum(totals) / sum(weights), an entry a question: right answers of one each, or nats of so many tokens."""

    totals: Sequence[float]
    weights: Sequence[float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What all questions give, and the 95 % interval."""

    value: float
    low: float
    high: float


def estimate(ratio: Ratio, minus: Ratio | None = None) -> Estimate:
    """The ratio, or how much larger it is than `minus`, which is of the same questions.

    The difference is paired: both are resampled to the same questions, so that what makes a question hard for both does
    not widen the interval.
    """
    resampled_R = _resampled(ratio) - (_resampled(minus) if minus is not None else 0.0)
    low, high = np.percentile(resampled_R, _PERCENTILES)
    value = _value(ratio) - (_value(minus) if minus is not None else 0.0)
    return Estimate(value, float(low), float(high))


def _value(ratio: Ratio) -> float:
    return sum(ratio.totals) / sum(ratio.weights)


def _resampled(ratio: Ratio) -> NDArray[np.float64]:
    """The ratio [R] of as many questions, drawn with replacement, NUM_RESAMPLES times."""
    entries_2Q = np.array([ratio.totals, ratio.weights], dtype=np.float64)
    num_questions = entries_2Q.shape[1]
    draw = np.random.default_rng(_SEED)
    sums = [entries_2Q[:, draw.integers(num_questions, size=num_questions)].sum(1) for _ in range(NUM_RESAMPLES)]
    totals_R, weights_R = np.array(sums).T
    ratio_R: NDArray[np.float64] = totals_R / weights_R
    return ratio_R
