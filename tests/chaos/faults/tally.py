"""What many episodes came to."""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.chaos.faults.catalogue import KINDS
from tests.chaos.faults.episode import Report


class Tally:
    """Counts by kind and outcome, and where to look when something is wrong."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._outcomes: Counter[tuple[str, str]] = Counter()
        self._episodes = self._steps = self._attempts = self._trained_tokens = 0
        self.failures: list[str] = []

    def add(self, report: Report) -> None:
        self._outcomes += report.outcomes
        self._episodes += 1
        self._steps += report.steps
        self._attempts += report.attempts
        self._trained_tokens += report.trained_tokens
        if report.violations:
            self.failures.append(str(report))

    @property
    def num_faults(self) -> int:
        return sum(self._outcomes.values())

    def missing(self) -> list[str]:
        """Kinds that never occurred."""
        occurred = {kind for kind, _ in self._outcomes}
        return [kind for kind in KINDS if kind not in occurred]

    def result(self) -> dict[str, Any]:
        by_kind: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
        by_outcome: Counter[str] = Counter()
        for (kind, outcome), number in sorted(self._outcomes.items()):
            by_kind[kind][outcome] = number
            by_outcome[outcome] += number
        return {
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
            "faults": self.num_faults,
            "episodes": self._episodes,
            "steps": self._steps,
            "attempts": self._attempts,
            "trained_tokens": self._trained_tokens,
            "episodes_with_a_violation": len(self.failures),
            "seconds": round(time.perf_counter() - self._began, 1),
            "by_outcome": dict(sorted(by_outcome.items())),
            "by_kind": by_kind,
        }

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.result(), indent=2) + "\n")
