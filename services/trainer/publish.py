"""Publishing the policy: which version it becomes, whether it is durable, and what it was made from."""

from __future__ import annotations

from foundry.identity import CartridgeBytes
from foundry.model.cartridge import TrainableCartridge
from foundry.store import CartridgeId, ManifestDraft
from services.trainer import metrics
from services.trainer.attempt import Attempt
from services.trainer.checkpoint import Best, Progress
from services.trainer.update.step import Update


class PolicyPublisher:
    """Makes versions of the cartridge in training; `progress.policy` is always the last one."""

    def __init__(self, attempt: Attempt, cartridge: TrainableCartridge, progress: Progress) -> None:
        self._attempt, self._spec = attempt, attempt.spec
        self._cartridge, self._progress = cartridge, progress

    async def publish(self, update: Update | None = None) -> CartridgeId:
        """What `update` made of the last version; without one, where the attempt begins.

        After a resume these are the same bytes as then, hence the same version, again.
        """
        if update is None:
            return await self._publish(durable=False)
        measured = {"loss": update.loss}
        if update.proof is not None:
            measured["policy_mismatch_kl"] = update.proof.total.kl
        return await self._publish(durable=False, parent=self._progress.policy.digest, measured=measured)

    async def publish_again(self) -> CartridgeId:
        """Durably: the same version, unless Redis lost it. What it was made from is not known any more."""
        return await self._publish(durable=True)

    async def publish_best(self, best: Best) -> CartridgeId:
        """Durably, the bytes of the best version once more: `latest` then means them."""
        stored = await self._attempt.version(f"{self._spec.name}@{best.policy.digest}")
        measured = {"heldout_kl": best.kl, "best_step": float(best.step)}
        return await self._publish(stored, durable=True, parent=self._progress.policy.digest, measured=measured)

    async def _publish(
        self,
        stored: CartridgeBytes | None = None,
        *,
        durable: bool,
        parent: str | None = None,
        measured: dict[str, float] | None = None,
    ) -> CartridgeId:
        progress, spec = self._progress, self._spec
        draft = ManifestDraft(
            name=spec.name,
            run=self._attempt.claimed.run_id,
            attempt=self._attempt.claimed.attempt,
            step=progress.step,
            parent=parent,
            document=spec.document,
            init=spec.start,
            objective=spec.loss,
            tokens_seen=progress.tokens_seen,
            metrics=measured or {},
        )
        durable = durable or progress.step in (0, spec.num_steps) or progress.step % spec.durable_every == 0
        stored = stored or self._cartridge.snapshot().to_bytes()
        manifest = await self._attempt.publish(stored, draft, durable=durable)
        progress.policy = CartridgeId(spec.name, manifest.version, manifest.digest)
        metrics.VERSION.set(manifest.version)
        return progress.policy
