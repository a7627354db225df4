"""Answers that were there before the run began: those of the model with the document before it, and its own words.

No policy wrote them, so there is nothing of it to prove. Who did is proved once, when they are scored: a model's words
are as likely behind the context as was said when they were written, the document's stand in the document.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective
from foundry.selfstudy.wording import normalised
from services.trainer.attempt import Attempt
from services.trainer.contexts import Context
from services.trainer.data.curriculum import Curriculum
from services.trainer.policy import Policy
from services.trainer.sample import Sample
from services.trainer.signal_cache import SignalCache
from services.trainer.signals import Teachers
from services.trainer.stages import Stages
from services.trainer.update.authorship import prove_authors
from services.trainer.update.gradient import Signal


class OffPolicy:
    def __init__(
        self,
        attempt: Attempt,
        lm: FrozenLM,
        contexts: Sequence[Context],
        curriculum: Curriculum,
        teachers: Teachers,
        cache: SignalCache,
        objective: Objective,
    ) -> None:
        self._attempt, self._spec, self._lm = attempt, attempt.spec, lm
        self._words = {context.digest: normalised(context.text) for context in contexts}
        self._curriculum, self._teachers, self._cache, self._objective = curriculum, teachers, cache, objective
        # In which step each answer comes up first: it is always scored among those of that step, so that its signal has
        # the same bits whenever it is asked for, and in an attempt that begins later.
        self._first_steps: dict[str, int] = {}
        self._scanned = 0

    def proves_policy(self, step: int) -> bool:
        return False

    async def samples(self, step: int, policy: Policy, stages: Stages) -> list[Sample]:
        return self._written(step)

    async def signals(self, step: int, samples: Sequence[Sample]) -> list[Signal]:
        # Both take long where there are many: a resumed run goes through all steps before, signals may lie on disk.
        await asyncio.to_thread(self._scan, step)
        found = await asyncio.to_thread(self._kept, samples)
        for first in sorted({self._first_steps[key] for key, signal in found.items() if signal is None}):
            batch = self._written(first)
            for sample, scored in zip(batch, await self._score(batch), strict=True):
                if self._first_steps[sample.key] == first:
                    found[sample.key] = self._keep(sample, scored)
        return [signal for sample in samples if (signal := found[sample.key]) is not None]

    def _kept(self, samples: Sequence[Sample]) -> dict[str, Signal | None]:
        return {sample.key: self._cache.get(sample.key) for sample in samples}

    def _keep(self, sample: Sample, signal: Signal) -> Signal:
        if (kept := self._cache.get(sample.key)) is not None:
            return kept
        self._cache.put(sample.key, signal)
        return signal

    def _written(self, step: int) -> list[Sample]:
        return [
            Sample.written(conversation, f"step {step + 1}, {conversation.family}")
            for conversation in self._curriculum.written_batch(step, self._spec)
        ]

    def _scan(self, step: int) -> None:
        for each in range(self._scanned, step + 1):
            for sample in self._written(each):
                self._first_steps.setdefault(sample.key, each)
        self._scanned = max(self._scanned, step + 1)

    async def _score(self, samples: Sequence[Sample]) -> Sequence[Signal]:
        signals = await self._attempt.retry.call("teacher", lambda: self._teachers.signals(samples, self._objective))
        threshold = self._spec.policy_mismatch_threshold
        await asyncio.to_thread(prove_authors, self._lm, self._words, samples, signals, threshold)
        return signals
