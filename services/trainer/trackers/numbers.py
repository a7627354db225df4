"""What of an event is drawn over the steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_GROUPS = {"step": "train", "heldout": "heldout"}
# Which step it is, and of how many, is the axis.
_AXIS = {"step", "num_steps", "attempt"}


def numbers(event: Mapping[str, Any]) -> dict[str, float]:
    """By name, such as `train/loss`, `train/seconds/rollout`, `heldout/kl`; none for events of other types."""
    group = _GROUPS.get(str(event.get("type")))
    if group is None:
        return {}
    return {f"{group}/{name}": value for name, value in _flat(event) if name not in _AXIS}


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", number) for inner, number in _flat(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value
