"""The study's figures: held-out KL and right answers along answer tokens or seconds, means of documents and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks.study.intervals import Interval, interval
from benchmarks.study.results import Axis, Quantity, Result, measurements

_LABELS: dict[Axis, str] = {"answer_tokens": "answer tokens trained on", "seconds": "seconds of training"}
_PANELS: tuple[tuple[Quantity, str], ...] = (
    ("kl", "held-out KL, nats a token"),
    ("answerable", "share answered right"),
)


def curves(path: Path, axis: Axis, lines: Mapping[str, dict[str, list[Result]]]) -> None:
    """A line with its 95 % band for each of `lines`, results by document, as SVG."""
    # The same study gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "study", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        for panel, (quantity, label) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
            for name, by_document in lines.items():
                places, intervals = curve(by_document, quantity, axis)
                panel.plot(places, [each.value for each in intervals], marker="o", markersize=3, label=name)
                panel.fill_between(
                    places, [each.low for each in intervals], [each.high for each in intervals], alpha=0.15
                )
            panel.set_xlabel(_LABELS[axis])
            panel.set_ylabel(label)
            if quantity == "kl":
                panel.set_yscale("log")
            panel.grid(alpha=0.3)
        panel.legend()
        figure.savefig(path, format="svg", metadata={"Date": None})


def curve(by_document: dict[str, list[Result]], quantity: Quantity, axis: Axis) -> tuple[list[float], list[Interval]]:
    """At every mark that all results have: where it stands on the axis, on average, and what there is."""
    results = [each for some in by_document.values() for each in some]
    places_M = [
        float(np.mean([each.along(axis)[mark] for each in results]))
        for mark in range(min(len(each.marks) for each in results))
    ]
    return places_M, [interval(measurements(by_document, quantity, axis, place)) for place in places_M]
