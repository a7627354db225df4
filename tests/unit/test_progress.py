"""How a run's events are shown."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from foundry.cli.progress import RunView, _left


def step(number: int, seconds: float = 10.0) -> dict[str, Any]:
    stages = {"rollout": 4.0, "teacher": 1.0, "update": 4.9, "publish": 0.1, "total": seconds}
    return {
        "type": "step",
        "step": number,
        "num_steps": 20,
        "objective": "forward_kl",
        "loss": 0.25,
        "version": number + 1,
        "seconds": stages,
    }


EVENTS: list[dict[str, Any]] = [
    {"type": "state", "state": "running", "attempt": 1, "waiting_for": ""},
    {"type": "progress", "stage": "self-study", "done": 0, "total": 8},
    {"type": "progress", "stage": "self-study", "done": 4, "total": 8},
    {"type": "progress", "stage": "self-study", "done": 8, "total": 8},
    {
        "type": "dataset",
        "families": {
            "cloze": {"conversations": 12, "answer_tokens": 99, "coverage": 2.5},
            "prompts": {"conversations": 3, "answer_tokens": 0, "coverage": 0.0},
        },
    },
    {"type": "heldout", "step": 0, "kl": 0.5, "nll": 0.9, "num_tokens": 99},
    step(1),
    {"type": "state", "state": "waiting", "attempt": 1, "waiting_for": "teacher: can't be reached"},
    {"type": "of a kind that a later version reports"},
    step(2, 20.0),
    {"type": "heldout", "step": 2, "kl": 0.4, "nll": 0.7, "num_tokens": 99},
    {"type": "finished", "state": "succeeded", "error": None, "result": {}},
]


def shown(*, terminal: bool) -> str:
    output = io.StringIO()
    with RunView("handbook", Console(file=output, force_terminal=terminal, width=160)) as view:
        for event in EVENTS:
            view.show(event)
    return output.getvalue()


def test_lines_where_there_is_no_terminal() -> None:
    stages = "(rollout 4.0  teacher 1.0  update 4.9  publish 0.1)"
    assert shown(terminal=False).splitlines() == [
        "handbook: running",
        "handbook: self-study 0/8",
        "handbook: self-study 8/8",
        "handbook: data: 12 cloze, 3 prompts; passages cover the document 2.5 times",
        "handbook: step 0: held-out KL 0.500, NLL 0.900",
        f"handbook: step 1/20: forward_kl 0.250  version 2  10.0 s/step {stages}  3:10 left",
        "handbook: waiting for teacher: can't be reached",
        # Eighteen steps of the mean, 15 s.
        f"handbook: step 2/20: forward_kl 0.250  version 3  20.0 s/step {stages}  4:30 left",
        "handbook: step 2: held-out KL 0.400, NLL 0.700",
        "handbook: succeeded",
    ]


def test_before_the_first_step_the_time_of_the_stage_is_said() -> None:
    output, now = io.StringIO(), [0.0]
    with RunView("handbook", Console(file=output, force_terminal=True, width=160), clock=lambda: now[0]) as view:
        for now[0], done in ((100.0, 2), (130.0, 4)):
            view.show({"type": "progress", "stage": "self-study", "done": done, "total": 10})
    # Two in thirty seconds, and six to go.
    assert "1:30 left" in output.getvalue()


@pytest.mark.parametrize(("seconds", "said"), [(59.6, "1:00 left"), (4.4, "0:04 left"), (3725.0, "62:05 left")])
def test_seconds_are_rounded_before_they_are_minutes(seconds: float, said: str) -> None:
    assert _left(seconds) == said


@pytest.mark.parametrize(
    "part", ["2/20", "held-out KL 0.500 → 0.400, NLL 0.900 → 0.700", "forward_kl 0.250", "version 3", "4:30 left"]
)
def test_live_view_shows(part: str) -> None:
    assert part in shown(terminal=True)
