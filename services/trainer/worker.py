"""The worker: takes one run after another from the queue, or a given one, and sees each to its end."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import structlog

from foundry.errors import Fenced, FoundryError, RankLost, RunOver, StoreUnavailable
from foundry.model.lm import FrozenLM
from foundry.rpc.retry import Retry
from foundry.store import CartridgeStore, ClaimedRun, RunState
from foundry.tasks import end
from services.trainer import metrics
from services.trainer.active import ActiveRun
from services.trainer.attempt import Attempt
from services.trainer.control import Control
from services.trainer.exits import FAILED, STOPPED
from services.trainer.heartbeat import Heartbeat
from services.trainer.prepare import Preparation
from services.trainer.ranks.leader import Leader
from services.trainer.settings import TrainerSettings
from services.trainer.trackers.choice import open_trackers
from services.trainer.trackers.tracker import close

log = structlog.get_logger(__name__)
CLAIM_SECONDS = 5.0
# How long a run that has ended waits for trackers that have not taken all of it.
_TRACKERS_SECONDS = 10.0


class Worker:
    """Claims, trains, reports the end. One run at a time: the device has one cartridge in training."""

    def __init__(
        self, lm: FrozenLM, settings: TrainerSettings, store: CartridgeStore, leader: Leader | None = None
    ) -> None:
        self.lm = lm
        self.active: ActiveRun | None = None
        # How the last run ended that this worker saw to its end, or that it put aside.
        self.ended: RunState | None = None
        self._settings, self._store, self._leader = settings, store, leader
        metrics.observe_state(lambda: self.active.state if self.active is not None else metrics.IDLE)

    async def work_until(self, stopping: asyncio.Event) -> int:
        """Work until told to stop, or until the one run of the settings is over. Returns the exit status.

        An active run is given back: the next worker takes it up from its checkpoint. Raises RunNotFound and RankLost.
        """
        working = asyncio.create_task(self._work())
        others: list[asyncio.Task[Any]] = [asyncio.create_task(stopping.wait())]
        if self._leader is not None:
            others.append(asyncio.create_task(self._leader.beat()))
        ended, _ = await asyncio.wait({working, *others}, return_when=asyncio.FIRST_COMPLETED)
        if self.active is None:
            await end(working)
        else:
            # A run is given back meanwhile, and must not be cut short in that.
            await end(working, again_seconds=self._settings.grace_seconds)
        if self._settings.run and self.ended is not None:
            return FAILED if self.ended is RunState.FAILED else 0
        if stopping.is_set() and working.cancelled():
            return STOPPED
        for task in (*ended, working):
            task.result()
        return 0

    async def _work(self) -> None:
        with suppress(RunOver):
            # Where there is one run, and it is paused, whoever starts workers starts another when it is resumed.
            while not (self._settings.run and self.ended is RunState.PAUSED):
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
        metrics.LAST_STEP_TIMESTAMP.set_to_current_time()
        with structlog.contextvars.bound_contextvars(run=claimed.run_id, attempt=claimed.attempt):
            log.info("claimed", name=claimed.spec.name)
            trackers = open_trackers(self._settings, claimed)
            active = self.active = ActiveRun(Attempt(claimed, self._store, self._retry(), trackers), Control())
            heart = Heartbeat(active, self._settings.lease_seconds)
            # Until the end is written down: that may take as long as a step.
            beating = asyncio.create_task(heart.beat())
            try:
                await self._train_and_end(active, heart)
            finally:
                await end(beating)
                self.active = None
                await asyncio.to_thread(close, trackers, _TRACKERS_SECONDS)

    def _retry(self) -> Retry:
        return Retry(self._settings.patience_seconds, on_failure=metrics.count_failure)

    async def _train_and_end(self, active: ActiveRun, heart: Heartbeat) -> None:
        """Train, and have the store know how that ended: the run is over, given back, or another worker's already."""
        try:
            await self._train(active, heart)
        except Fenced as error:
            _note_fenced(error)
        except (asyncio.CancelledError, RankLost):
            # This worker is being stopped, not the run: another goes on from the last checkpoint.
            await self._give_back(active)
            raise
        except FoundryError as error:
            log.error("run failed", reason=error.reason, error=error.message)
            await self._finish(active, RunState.FAILED, f"{error.reason}: {error.message}")
        except Exception as error:
            # A fault of ours: the run must not be taken up again and again to fail the same way.
            log.exception("run failed")
            await self._finish(active, RunState.FAILED, f"INTERNAL: {error!r}; see the trainer's log")
            raise
        else:
            if active.run is not None and active.run.paused:
                log.info("paused", step=active.run.progress.step)
                self.ended = RunState.PAUSED
                await self._give_back(active)
                return
            await self._finish(active, RunState.CANCELLED if active.control.cancelled else RunState.SUCCEEDED)

    async def _train(self, active: ActiveRun, heart: Heartbeat) -> None:
        """Prepare and train, to the end or until cancelled. Raises what made that impossible, Fenced among it."""
        training = asyncio.create_task(self._prepare_and_train(active))
        try:
            either: set[asyncio.Future[Any]] = {training, heart.abandoned}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if training.done():
                training.result()
            elif fenced := heart.abandoned.result():
                raise fenced
        finally:
            await end(training)

    async def _prepare_and_train(self, active: ActiveRun) -> None:
        preparation = Preparation(active.attempt, self.lm, self._settings, leader=self._leader)
        try:
            active.run = await preparation.run(active.control)
            await active.run.train()
        finally:
            await preparation.close()

    async def _give_back(self, active: ActiveRun) -> None:
        metrics.RUNS.labels("requeued").inc()
        with suppress(Fenced, StoreUnavailable):
            await active.attempt.requeue(active.result)

    async def _finish(self, active: ActiveRun, state: RunState, error: str | None = None) -> None:
        finishing = asyncio.ensure_future(active.attempt.finish(state, error, active.result))
        try:
            await asyncio.shield(finishing)
        except Fenced as fenced:
            _note_fenced(fenced)
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


def _note_fenced(error: Fenced) -> None:
    """Another attempt has the run: it alone may say how it ends."""
    log.warning("fenced", error=str(error))
    metrics.RUNS.labels("fenced").inc()
