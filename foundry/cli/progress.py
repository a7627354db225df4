"""A run as one watches it: its events, live on a terminal, one line each anywhere else.

with RunView(name, console) as view:
    for event in events:
        view.show(event)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

STAGES = ("rollout", "teacher", "update", "publish")
# The time to go is estimated from this many steps: lengths of answers change while a cartridge learns.
_RECENT_STEPS = 8


class RunView:
    def __init__(self, name: str, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._console, self._clock = name, console, clock
        self._live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self._task = self._bar.add_task(name, total=None, left="")
        # Kept apart, so that a line for eighty columns holds each.
        self._quality = self._speed = ""
        # What is done before the first step, since when, and how much of it was done then.
        self._stage, self._began, self._done_before = "", 0.0, 0
        self._heldout: list[Mapping[str, Any]] = []
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
            self._refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, event: Mapping[str, Any]) -> None:
        """Events of kinds that this version does not know are passed over."""
        match event.get("type"):
            case "state":
                waiting_for = event.get("waiting_for")
                state = f"waiting for {waiting_for}" if waiting_for else event["state"]
                self._bar.update(self._task, description=f"{self._name} ({state})")
                self._line(state)
            case "progress":
                self._progress(event)
            case "heldout":
                self._heldout.append(event)
                self._line(f"step {event['step']}: {_measures([event])}")
            case "dataset":
                parts = [f"{counts['conversations']:.0f} {family}" for family, counts in event["families"].items()]
                covers = sum(counts["coverage"] for counts in event["families"].values())
                self._line(f"data: {', '.join(parts)}; passages cover the document {covers:.1f} times")
            case "step":
                self._step(event)
            case "finished":
                self._line(f"{event['state']}")
        self._refresh()

    def _progress(self, event: Mapping[str, Any]) -> None:
        stage, done, total = event["stage"], event["done"], event["total"]
        if stage != self._stage or done == total:
            self._line(f"{stage} {done}/{total}")
        if stage != self._stage:
            self._stage, self._began, self._done_before = stage, self._clock(), done
        lately = done - self._done_before
        left = _left((self._clock() - self._began) / lately * (total - done)) if lately else ""
        self._bar.update(self._task, description=f"{self._name}: {stage}", completed=done, total=total, left=left)

    def _step(self, event: Mapping[str, Any]) -> None:
        step, num_steps, seconds = event["step"], event["num_steps"], event["seconds"]
        self._recent.append(seconds["total"])
        left = _left((num_steps - step) * sum(self._recent) / len(self._recent))
        stages = "  ".join(f"{stage} {seconds[stage]:.1f}" for stage in STAGES if stage in seconds)
        self._quality = f"{event.get('objective', 'loss')} {event['loss']:.3f}  version {event['version']}"
        self._speed = f"{seconds['total']:.1f} s/step ({stages})"
        self._bar.update(self._task, description=self._name, completed=step, total=num_steps, left=left)
        self._line(f"step {step}/{num_steps}: {self._quality}  {self._speed}  {left}")

    def _line(self, text: str) -> None:
        if self._live is None:
            self._console.print(f"{self._name}: {text}", highlight=False, markup=False, soft_wrap=True)

    def _refresh(self) -> None:
        if self._live is not None:
            quality = "  ".join(part for part in (_measures(self._heldout), self._quality) if part)
            self._live.update(Group(self._bar, Text(quality), Text(self._speed)))


def _left(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} left"


def _measures(heldout: Sequence[Mapping[str, Any]]) -> str:
    """From the first measurement to the last, of what the trainer said: an older one had no likelihoods."""
    ends = [*heldout[:1], *heldout[1:][-1:]]
    measures = (("kl", "held-out KL"), ("nll", "NLL"))
    return ", ".join(
        f"{label} {' → '.join(f'{each[name]:.3f}' for each in ends)}"
        for name, label in measures
        if ends and all(name in each for each in ends)
    )
