"""The run that this worker trains now, as others see it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from foundry.store import RunState
from services.trainer.attempt import Attempt
from services.trainer.control import Control
from services.trainer.run import Run


@dataclass
class ActiveRun:
    attempt: Attempt
    control: Control
    # None until it is prepared.
    run: Run | None = None

    @property
    def state(self) -> RunState:
        return RunState.WAITING if self.attempt.retry.waiting_for else RunState.RUNNING

    @property
    def result(self) -> dict[str, object]:
        """What came of it so far."""
        if self.run is None:
            return {}
        progress = self.run.progress
        return {
            "step": progress.step,
            "version": progress.policy.version,
            "digest": progress.policy.digest,
            "tokens_seen": progress.tokens_seen,
            "heldout_kl_first": progress.heldout_kl_first,
            "heldout_kl_last": progress.heldout_kl_last,
            "best": asdict(progress.best) if progress.best else None,
        }
