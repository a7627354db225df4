"""The worker: takes one run after another from the queue, or a given one, and sees each to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import structlog

from foundry.errors import Fenced, FoundryError, RankLost, RunOver, StoreUnavailable
from foundry.model.lm import FrozenLM
from foundry.rpc.retry import Retry
from foundry.store import CartridgeStore, ClaimedRun, Desired, RunState
from services.trainer import metrics
from services.trainer.checkpoint import Progress
from services.trainer.control import Control
from services.trainer.prepare import Preparation
from services.trainer.ranks.leader import Leader
from services.trainer.run import Run
from services.trainer.settings import TrainerSettings

log = structlog.get_logger(__name__)
CLAIM_SECONDS = 5.0


@dataclass
class Hand:
    """The run in hand."""

    claimed: ClaimedRun
    control: Control
    retry: Retry
    run: Run | None = None

    @property
    def state(self) -> RunState:
        if self.retry.waiting_for:
            return RunState.WAITING
        return RunState.PAUSED if self.control.paused else RunState.RUNNING

    @property
    def progress(self) -> Progress | None:
        return self.run.progress if self.run is not None else None


class Worker:
    """Claims, trains, reports the end. One run at a time: the device has one cartridge in training."""

    def __init__(
        self, lm: FrozenLM, settings: TrainerSettings, store: CartridgeStore, leader: Leader | None = None
    ) -> None:
        self.lm = lm
        self.hand: Hand | None = None
        # How the last run ended that ended in this worker's hand.
        self.ended: RunState | None = None
        self._settings = settings
        self._store = store
        self._leader = leader
        metrics.observe_state(lambda: self.hand.state if self.hand is not None else metrics.IDLE)

    async def work(self) -> None:
        """Run for ever, or until the one run of the settings is over; cancel the task to stop.

        The next worker takes a run in hand up from its checkpoint. Raises RunNotFound and RankLost.
        """
        with suppress(RunOver):
            while True:
                if claimed := await self._claim():
                    await self._see_through(claimed)

    async def _claim(self) -> ClaimedRun | None:
        runs, run_id, worker = self._store.runs, self._settings.run, self._settings.worker
        lease_seconds = self._settings.lease_seconds

        async def attempt() -> ClaimedRun | None:
            if run_id:
                return await runs.claim_run(run_id, worker, lease_seconds, timeout_seconds=CLAIM_SECONDS)
            return await runs.claim(worker, lease_seconds, timeout_seconds=CLAIM_SECONDS)

        return await self._retry().call("store", attempt)

    async def _see_through(self, claimed: ClaimedRun) -> None:
        self.hand = Hand(claimed, Control(), self._retry())
        metrics.LAST_STEP_TIMESTAMP.set_to_current_time()
        with structlog.contextvars.bound_contextvars(run=claimed.run_id, attempt=claimed.attempt):
            log.info("claimed", name=claimed.spec.name)
            training = asyncio.create_task(self._train(self.hand))
            lost = asyncio.Event()
            heart = asyncio.create_task(self._heartbeat(self.hand, training.cancel, lost))
            try:
                await training
            except Fenced as error:
                # Another attempt has the run: it alone may say how it ends.
                log.warning("fenced", error=str(error))
                metrics.RUNS.labels("fenced").inc()
            except asyncio.CancelledError:
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    # This worker is being stopped, not the run: another goes on from the last checkpoint.
                    await self._give_back(self.hand)
                    raise
                if lost.is_set():
                    metrics.RUNS.labels("fenced").inc()
                else:
                    await self._finish(self.hand, RunState.CANCELLED, None)
            except RankLost:
                await self._give_back(self.hand)
                raise
            except FoundryError as error:
                log.error("run failed", reason=error.reason, error=error.message)
                await self._finish(self.hand, RunState.FAILED, f"{error.reason}: {error.message}")
            except Exception as error:
                # A fault of ours: the run must not be taken up again and again to fail the same way.
                log.exception("run failed")
                await self._finish(self.hand, RunState.FAILED, f"INTERNAL: {error!r}; see the trainer's log")
                raise
            else:
                cancelled = self.hand.control.cancelled
                await self._finish(self.hand, RunState.CANCELLED if cancelled else RunState.SUCCEEDED, None)
            finally:
                heart.cancel()
                training.cancel()
                self.hand = None

    def _retry(self) -> Retry:
        return Retry(self._settings.patience_seconds, on_failure=metrics.count_failure)

    async def _train(self, hand: Hand) -> None:
        preparation = Preparation(
            hand.claimed,
            self.lm,
            self._settings,
            store=self._store,
            retry=hand.retry,
            leader=self._leader,
        )
        try:
            hand.run = await preparation.run(hand.control)
            await hand.run.train()
        finally:
            await preparation.close()

    async def _heartbeat(self, hand: Hand, abandon: Callable[[], object], lost: asyncio.Event) -> None:
        """Keep the lease, pass on what users want, and give up at once when the run is another's."""
        claimed, lease_seconds = hand.claimed, self._settings.lease_seconds
        while True:
            try:
                desired = await self._store.runs.heartbeat(
                    claimed.run_id,
                    claimed.attempt,
                    lease_seconds,
                    state=hand.state,
                    waiting_for=hand.retry.waiting_for,
                )
            except Fenced as error:
                log.warning("fenced", error=str(error))
                lost.set()
                abandon()
                return
            except StoreUnavailable as error:
                log.warning("heartbeat failed", error=str(error))
            except Exception:
                # A fault of ours; the heart goes on beating, or another worker would take the run beside us.
                log.exception("heartbeat failed")
            else:
                self._obey(hand, desired, abandon)
            await asyncio.sleep(lease_seconds / 5)

    def _obey(self, hand: Hand, desired: Desired, abandon: Callable[[], object]) -> None:
        if desired is Desired.CANCEL:
            hand.control.cancel()
            if hand.run is None or hand.retry.waiting_for:
                # No step is in hand that could end well: preparing, or waiting for what may never come back.
                abandon()
        elif desired is Desired.PAUSE:
            hand.control.pause()
        else:
            hand.control.resume()

    async def _give_back(self, hand: Hand) -> None:
        metrics.RUNS.labels("requeued").inc()
        with suppress(Fenced, StoreUnavailable):
            await self._store.runs.requeue(hand.claimed.run_id, hand.claimed.attempt, result=_result(hand.progress))

    async def _finish(self, hand: Hand, state: RunState, error: str | None) -> None:
        run_id, attempt, result = hand.claimed.run_id, hand.claimed.attempt, _result(hand.progress)
        finishing = asyncio.ensure_future(
            hand.retry.call(
                "store", lambda: self._store.runs.finish(run_id, attempt, state, error=error, result=result)
            )
        )
        try:
            await asyncio.shield(finishing)
        except Fenced as fenced:
            log.warning("fenced", error=str(fenced))
            metrics.RUNS.labels("fenced").inc()
        except asyncio.CancelledError:
            # Whoever sees the run over may stop us at once, before its end is in object storage.
            await asyncio.wait({finishing}, timeout=self._settings.grace_seconds)
            if not finishing.cancel() and finishing.exception() is None:
                self._note_end(state)
            raise
        else:
            self._note_end(state)

    def _note_end(self, state: RunState) -> None:
        self.ended = state
        metrics.RUNS.labels(state).inc()


def _result(progress: Progress | None) -> dict[str, object]:
    if progress is None:
        return {}
    return {
        "step": progress.step,
        "version": progress.policy.version,
        "digest": progress.policy.digest,
        "tokens_seen": progress.tokens_seen,
        "heldout_kl_first": progress.heldout_kl_first,
        "heldout_kl_last": progress.heldout_kl_last,
    }
