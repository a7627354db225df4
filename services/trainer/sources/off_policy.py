"""Answers that were there before the run began: those of the model with the document before it, and its own words."""

from __future__ import annotations

from foundry.store.names import CartridgeId
from foundry.store.spec import RunSpec
from services.trainer.curriculum import Curriculum
from services.trainer.sample import Sample


class OffPolicy:
    """No policy wrote them, so there is nothing of it to prove."""

    def __init__(self, spec: RunSpec, curriculum: Curriculum, context_digest: str) -> None:
        """`context_digest` names the document's tokens, behind which the answers were written."""
        self._spec, self._curriculum, self._context_digest = spec, curriculum, context_digest

    def proves_policy(self, step: int) -> bool:
        return False

    async def samples(self, step: int, policy: CartridgeId) -> list[Sample]:
        spec = self._spec
        written = self._curriculum.written_batch(step, spec.batch_size * spec.samples_per_prompt, spec.seed)
        return [
            Sample(
                item.turn_ids,
                item.answer_ids,
                (),
                self._context_digest,
                policy.version,
                truncated=len(item.answer_ids) == spec.max_new_tokens,
                place=f"step {step + 1}, {item.family}",
            )
            for item in written
        ]
