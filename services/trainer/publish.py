"""Publishing the policy: which version it becomes, whether it is durable, and what it was made from."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from foundry.identity import CartridgeBytes
from foundry.model.cartridge import TrainableCartridge
from foundry.store import CartridgeId, ManifestDraft
from foundry.tasks import end
from services.trainer import metrics
from services.trainer.attempt import Attempt
from services.trainer.checkpoint import Best, Older, Progress
from services.trainer.policy import Policy
from services.trainer.stages import Stages
from services.trainer.update.step import Update


class PolicyPublisher:
    """Makes versions of the cartridge in training; `progress.policy` is always the last one that is out.

    It keeps the newest one and as many before it as steps in flight may claim: `max_staleness`.
    """

    def __init__(
        self, attempt: Attempt, cartridge: TrainableCartridge, progress: Progress, older: Sequence[Older] = ()
    ) -> None:
        """`older` are those of a checkpoint."""
        self._attempt, self._spec = attempt, attempt.spec
        self._cartridge, self._progress, self._older = cartridge, progress, older
        # By step, oldest first.
        self._published: dict[int, asyncio.Task[Policy]] = {}
        # One at a time: a number that was taken before another is out before it.
        self._publishing = asyncio.Lock()

    async def begin(self) -> None:
        """Publish where the attempt begins, and before it what steps in flight claim.

        After a resume these are the same bytes as then, hence the same versions, again.
        """
        for draft, stored in self._older:
            if draft.step + self._spec.max_staleness >= self._spec.num_steps:
                continue
            again = draft.model_copy(update={"attempt": self._attempt.claimed.attempt})
            await self._start(self._publish(again, stored), draft.step)
        await self._start(self._publish(self._draft(), self._bytes()), self._progress.step)

    def publish(self, update: Update, stages: Stages) -> asyncio.Task[Policy]:
        """What `update` made of the last version, which must be out.

        The bytes are copied before this returns, and the cartridge may change; the rest goes on in the background.
        """
        measured = {"loss": update.loss}
        if update.proof is not None:
            measured["policy_mismatch_kl"] = update.proof.total.kl
        draft, stored = self._draft(self._progress.policy.digest, measured), self._bytes()

        async def publish() -> Policy:
            with stages.timed("publish"):
                return await self._publish(draft, stored)

        return self._start(publish(), draft.step)

    async def policy(self, step: int) -> Policy:
        """The version after `step` updates, once it is out. Raises what its publication raised."""
        return await asyncio.shield(self._published[step])

    async def older(self) -> list[Older]:
        """What a checkpoint has to keep beside the newest version."""
        policies = [await self.policy(step) for step in self._published if step < self._progress.step]
        return [(policy.draft, policy.stored) for policy in policies]

    async def publish_again(self, policy: Policy | None = None) -> CartridgeId:
        """Durably, the newest version or `policy`: the same version, unless Redis lost it."""
        policy = policy or await self.policy(max(self._published))
        return (await self._publish(policy.draft, policy.stored, durable=True)).id

    async def publish_best(self, best: Best) -> None:
        """Durably, the bytes of the best version once more: `latest` then means them."""
        stored = await self._attempt.version(f"{self._spec.name}@{best.policy.digest}")
        measured = {"heldout_kl": best.kl, "best_step": float(best.step)}
        await self._publish(self._draft(self._progress.policy.digest, measured), stored, durable=True)

    async def close(self) -> None:
        await end(*self._published.values())

    def _start(self, publishing: Coroutine[Any, Any, Policy], step: int) -> asyncio.Task[Policy]:
        task = self._published[step] = asyncio.create_task(publishing)
        for each in [each for each in self._published if each < step - self._spec.max_staleness]:
            del self._published[each]
        return task

    async def _publish(self, draft: ManifestDraft, stored: CartridgeBytes, *, durable: bool = False) -> Policy:
        durable = durable or draft.step in (0, self._spec.num_steps) or draft.step % self._spec.durable_every == 0
        async with self._publishing:
            manifest = await self._attempt.publish(stored, draft, durable=durable)
        if draft.step == max(self._published):
            self._progress.policy = manifest.id
            metrics.VERSION.set(manifest.version)
        return Policy(manifest.id, draft, stored)

    def _bytes(self) -> CartridgeBytes:
        return self._cartridge.snapshot().to_bytes()

    def _draft(self, parent: str | None = None, measured: Mapping[str, float] | None = None) -> ManifestDraft:
        """Of the cartridge as it stands."""
        spec = self._spec
        return ManifestDraft(
            name=spec.name,
            run=self._attempt.claimed.run_id,
            attempt=self._attempt.claimed.attempt,
            step=self._progress.step,
            parent=parent,
            document=spec.document,
            init=spec.start,
            objective=spec.loss,
            tokens_seen=self._progress.tokens_seen,
            metrics=measured or {},
        )
