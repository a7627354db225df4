"""Random SIGKILLs, seeded: which process, and after how many steps or how much time."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from tests.chaos.supervisor import Victim

# Steps of the run between two kills at most; a run of (this many) steps a kill outlives its killer.
MAX_GAP_STEPS = 2
# Share of kills by the clock, at most so many steps' time after the last one: while something is still coming back.
_BY_THE_CLOCK, _MAX_GAP_STEP_TIMES = 0.5, 4.0
# Share of kills that may hit a process that has not come up since its last one.
_WHILE_COMING_UP = 0.1
# Share of kills that hit the one of its kind that is at work, where another stands by.
_AT_WORK = 0.75


@dataclass(frozen=True)
class Kill:
    """`seconds` are since the first; `step` is the run's last known."""

    seconds: float
    victim: str
    step: int


class Killer:
    """Kills processes of each kind equally often, in random order, and leaves most of them time to come back."""

    def __init__(
        self,
        victims: Mapping[str, Sequence[Victim]],
        *,
        seed: int,
        step_seconds: float,
        current_step: Callable[[], int],
        wait_for_steps: Callable[[int], Awaitable[None]],
        at_work: Callable[[], Awaitable[str]],
    ) -> None:
        """`victims` by kind.

        `wait_for_steps(n)` returns after `n` more steps of the run, `step_seconds` each; `at_work()` names the victim
        that has the run in hand, if that is known.
        """
        self.kills: list[Kill] = []
        self._victims = victims
        self._random = random.Random(seed)
        self._step_seconds = step_seconds
        self._current_step, self._wait_for_steps, self._at_work = current_step, wait_for_steps, at_work

    async def kill(self, num_kills: int) -> None:
        began = time.monotonic()
        kinds = sorted(self._victims)
        remaining = [kinds[index % len(kinds)] for index in range(num_kills)]
        while remaining:
            await self._gap()
            victim = await self._choose(remaining)
            self.kills.append(Kill(round(time.monotonic() - began, 2), victim.name, self._current_step()))
            await victim.kill()

    async def _choose(self, remaining: list[str]) -> Victim:
        """Take a kind off `remaining`, one with a process that is up unless there is none, and choose a process."""
        anyone = self._random.random() < _WHILE_COMING_UP
        up = {kind: [each for each in group if anyone or each.up.is_set()] for kind, group in self._victims.items()}
        kind = self._random.choice([kind for kind in remaining if up[kind]] or remaining)
        remaining.remove(kind)
        at_work = await self._at_work()
        busy = [each for each in up[kind] if each.name == at_work and self._random.random() < _AT_WORK]
        victim = self._random.choice(busy or up[kind] or self._victims[kind])
        if not anyone:
            await victim.up.wait()
        return victim

    async def _gap(self) -> None:
        if self._random.random() < _BY_THE_CLOCK:
            await asyncio.sleep(self._random.uniform(0, _MAX_GAP_STEP_TIMES * self._step_seconds))
        else:
            await self._wait_for_steps(self._random.randint(1, MAX_GAP_STEPS))
