"""How the learning rate goes over a run: up in the warm-up, then level or down to 0."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foundry.store import RunSpec


def learning_rate_scale(spec: RunSpec, step: int) -> float:
    """Of the run's highest learning rate, what the update after `step` others takes."""
    if step < spec.warmup_steps:
        return (step + 1) / (spec.warmup_steps + 1)
    if spec.schedule == "constant":
        return 1.0
    share = (step - spec.warmup_steps) / max(1, spec.num_steps - spec.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * share))
