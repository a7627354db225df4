"""One run under faults: before each step one to three of them, after each the invariant.

The loop is the trainer's own (`Run.train`); it is entered between two steps, where a run asks whether it may go on. An
attempt that ends with a typed error gives the run back, and the next one goes on from the last checkpoint.
"""

from __future__ import annotations

import asyncio
import random
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from foundry.errors import FoundryError
from foundry.store import ClaimedRun
from services.trainer import metrics
from services.trainer.control import Control
from services.trainer.run import Run
from tests.chaos.faults.catalogue import KINDS, Kind, Moment, draw, turns
from tests.chaos.faults.fault import Fault
from tests.chaos.faults.world import World

# From one step to the next, whatever went wrong in between: beyond it the run hangs.
STEP_SECONDS = 30.0
# Faults before one step: alone, and meeting each other.
FAULTS_PER_STEP = (1, 2, 3)


@dataclass
class Report:
    """What an episode did and what was wrong with it."""

    seed: int
    faults: list[Fault] = field(default_factory=list)
    # (kind, outcome) -> how often; outcomes are "absorbed", "retried" and "refused: REASON".
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    trained_tokens: int = 0
    steps: int = 0
    attempts: int = 0
    violations: list[str] = field(default_factory=list)

    @property
    def num_fired(self) -> int:
        return sum(self.outcomes.values())

    def __str__(self) -> str:
        faults = ", ".join(str(fault) for fault in self.faults)
        return f"FOUNDRY_FAULT_SEED={self.seed}: {self.violations} after {faults}"


class Episode:
    """Until `num_faults` have fired."""

    def __init__(
        self, world: World, seed: int, num_faults: int, kinds: Mapping[str, Kind] = KINDS, *, max_staleness: int = 0
    ) -> None:
        self._world, self._num_faults, self._kinds = world, num_faults, dict(kinds)
        self._max_staleness = max_staleness
        self._rng = random.Random(seed)
        # Drawn before all others.
        self._due = turns(seed, self._kinds)
        self.report = Report(seed)
        self._open: list[Fault] = []
        self._retries = _num_retries()

    async def play(self) -> Report:
        world, report = self._world, self.report
        run_id = await world.create_run(report.seed, self._max_staleness)
        while report.num_fired < self._num_faults and not world.observer.violations:
            claimed = await world.direct.runs.claim("trainer", 600)
            assert claimed is not None
            report.attempts += 1
            await self._attempt(claimed)
            await self._give_back(run_id)
        report.violations += world.observer.violations
        report.trained_tokens = world.observer.trained_tokens
        return report

    async def _attempt(self, claimed: ClaimedRun) -> None:
        control = _BetweenSteps(self)
        try:
            async with asyncio.timeout(STEP_SECONDS) as deadline, self._world.prepared(claimed, control) as run:
                control.deadline, control.run = deadline, run
                await run.train()
                self._settle("absorbed")
        except FoundryError as error:
            self._judge_error(error)
            self._settle(f"refused: {error.reason}")
        except TimeoutError:
            self._violation(f"no step within {STEP_SECONDS} s")
        except Exception as error:
            self._violation(f"an untyped error: {error!r}\n{''.join(traceback.format_exception(error))}")

    async def between_steps(self, control: _BetweenSteps) -> None:
        """The policy is published; the next step has not begun."""
        self._settle("retried" if _num_retries() > self._retries else "absorbed")
        self._retries = _num_retries()
        self.report.steps += 1
        await self._world.check_pointers()
        if self.report.num_fired >= self._num_faults or self._world.observer.violations:
            control.cancel()
            return
        for _ in range(self._rng.choice(FAULTS_PER_STEP)):
            await self._inject(control.run)

    async def _inject(self, run: Run) -> None:
        kind = self._due.pop() if self._due else draw(self._rng, self._kinds)
        fault = Fault(kind)
        self.report.faults.append(fault)
        self._open.append(fault)
        await self._kinds[kind].inject(Moment(self._world, run, self._rng), fault)

    def _settle(self, outcome: str) -> None:
        """Count what has fired since the last time."""
        for fault in [each for each in self._open if each.fired]:
            self._open.remove(fault)
            self.report.outcomes[fault.kind, outcome] += 1

    def _judge_error(self, error: FoundryError) -> None:
        # The base type is for faults of our own; a method's name that was damaged ends as one, too.
        damaged = any(fault.kind == "rpc-flip" and fault.fired for fault in self.report.faults)
        if type(error) is FoundryError and not damaged:
            self._violation(f"an error without a type: {error.message}")

    def _violation(self, text: str) -> None:
        self._world.observer.violation(text)

    async def _give_back(self, run_id: str) -> None:
        record = await self._world.direct.runs.get(run_id)
        await self._world.direct.runs.requeue(run_id, record.attempt)


class _BetweenSteps(Control):
    run: Run
    deadline: asyncio.Timeout

    def __init__(self, episode: Episode) -> None:
        super().__init__()
        self._episode = episode

    async def goes_on(self) -> bool:
        await self._episode.between_steps(self)
        self.deadline.reschedule(asyncio.get_running_loop().time() + STEP_SECONDS)
        return await super().goes_on()


def _num_retries() -> float:
    return sum(
        sample.value for metric in metrics.RETRIES.collect() for sample in metric.samples if "total" in sample.name
    )
