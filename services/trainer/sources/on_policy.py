"""The policy's own answers to the curriculum's prompts."""

from __future__ import annotations

import itertools

from opentelemetry import trace

from foundry.errors import CartridgeNotFound, DigestMismatch, Unavailable
from foundry.rpc.rollout import Prompt, RolloutClient
from foundry.seeds import derive_seed
from foundry.store.names import CartridgeId
from services.trainer.attempt import Attempt
from services.trainer.curriculum import Curriculum
from services.trainer.publish import PolicyPublisher
from services.trainer.sample import Sample
from services.trainer.stages import Stages

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
        publisher: PolicyPublisher,
        stages: Stages,
    ) -> None:
        self._attempt, self._spec, self._curriculum = attempt, attempt.spec, curriculum
        self._rollouts, self._publisher, self._stages = rollouts, publisher, stages

    def proves_policy(self, step: int) -> bool:
        return True

    async def samples(self, step: int, policy: CartridgeId) -> list[Sample]:
        with _tracer.start_as_current_span("prompts"):
            prompts = self._prompts(step)
        losses = itertools.count(1)

        async def sample() -> list[Sample]:
            nonlocal policy
            try:
                answers = await self._rollouts.sample(
                    prompts, policy, temperature=self._spec.temperature, max_new_tokens=self._spec.max_new_tokens
                )
            except (CartridgeNotFound, DigestMismatch) as error:
                if next(losses) > _MAX_LOSSES:
                    raise
                # Redis was emptied and this version was not durable, or all copies are damaged: the bytes are here.
                policy = await self._publisher.publish_again()
                raise Unavailable(f"{error.message}; it was published again") from error
            return [Sample.of(prompt, answer, policy) for prompt, answer in zip(prompts, answers, strict=True)]

        with self._stages.timed("rollout"):
            return await self._attempt.retry.call("rollout", sample)

    def _prompts(self, step: int) -> list[Prompt]:
        turns = self._curriculum.batch(step, self._spec.batch_size, self._spec.seed)
        return [
            Prompt(
                turn,
                derive_seed(self._spec.seed, step, place, copy),
                f"step {step + 1}, prompt {place + 1} of {len(turns)}, answer {copy + 1}",
            )
            for place, turn in enumerate(turns)
            for copy in range(self._spec.samples_per_prompt)
        ]
