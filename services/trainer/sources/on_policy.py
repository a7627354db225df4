"""The policy's own answers to the curriculum's prompts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from opentelemetry import trace

from foundry.errors import CartridgeNotFound, DigestMismatch, Unavailable
from foundry.model.objectives import Objective
from foundry.rpc.answers import Prompt
from foundry.rpc.rollout import RolloutClient
from foundry.seeds import derive_seed
from services.trainer.attempt import Attempt
from services.trainer.data.conversation import Conversation
from services.trainer.data.curriculum import Curriculum
from services.trainer.policy import Policy
from services.trainer.publish import PolicyPublisher
from services.trainer.sample import Sample
from services.trainer.signals import Teachers
from services.trainer.stages import Stages
from services.trainer.update.gradient import Signal

_tracer = trace.get_tracer(__name__)

# A version is published again so often while it is asked for; a server that reads another store never finds it.
_MAX_LOSSES = 5


class OnPolicy:
    """Every draw is seeded by its place, so that a step that is computed again asks the same."""

    def __init__(
        self,
        attempt: Attempt,
        curriculum: Curriculum,
        rollouts: RolloutClient,
        teachers: Teachers,
        objective: Objective,
        publisher: PolicyPublisher,
    ) -> None:
        self._attempt, self._spec, self._curriculum = attempt, attempt.spec, curriculum
        self._rollouts, self._teachers, self._objective = rollouts, teachers, objective
        self._publisher = publisher

    def proves_policy(self, step: int) -> bool:
        return True

    async def samples(self, step: int, policy: Policy, stages: Stages) -> list[Sample]:
        with _tracer.start_as_current_span("prompts"):
            asked = self._curriculum.asked_batch(step, self._spec)
            prompts = self._prompts(step, asked)
            contexts = [each.context for each in asked for _ in range(self._spec.samples_per_prompt)]
        losses, asked_of = itertools.count(1), policy.id

        async def sample() -> list[Sample]:
            nonlocal asked_of
            try:
                answers = await self._rollouts.sample(
                    prompts, asked_of, temperature=self._spec.temperature, max_new_tokens=self._spec.max_new_tokens
                )
            except (CartridgeNotFound, DigestMismatch) as error:
                if next(losses) > _MAX_LOSSES:
                    raise
                # Redis was emptied and this version was not durable, or all copies are damaged: the bytes are here.
                asked_of = await self._publisher.publish_again(policy)
                raise Unavailable(f"{error.message}; it was published again") from error
            return [
                Sample.of(prompt, answer, asked_of, context)
                for prompt, answer, context in zip(prompts, answers, contexts, strict=True)
            ]

        with stages.timed("rollout"):
            return await self._attempt.retry.call("rollout", sample)

    async def signals(self, step: int, samples: Sequence[Sample]) -> Sequence[Signal]:
        return await self._attempt.retry.call("teacher", lambda: self._teachers.signals(samples, self._objective))

    def _prompts(self, step: int, asked: Sequence[Conversation]) -> list[Prompt]:
        return [
            Prompt(
                each.turn_ids,
                derive_seed(self._spec.seed, step, place, copy),
                f"step {step + 1}, prompt {place + 1} of {len(asked)}, answer {copy + 1}",
            )
            for place, each in enumerate(asked)
            for copy in range(self._spec.samples_per_prompt)
        ]
