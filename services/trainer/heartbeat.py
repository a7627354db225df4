"""The heartbeat of the active run: it keeps the lease and brings back what users want of the run."""

from __future__ import annotations

import asyncio

import structlog

from foundry.errors import Fenced, StoreUnavailable
from foundry.store import Desired
from services.trainer.active import ActiveRun

log = structlog.get_logger(__name__)

_BEATS_PER_LEASE = 5


class Heartbeat:
    def __init__(self, active: ActiveRun, lease_seconds: float) -> None:
        self._active, self._lease_seconds = active, lease_seconds
        # Resolved once training must end, whatever it does: to Fenced if the run is another worker's, else to None.
        self.abandoned: asyncio.Future[Fenced | None] = asyncio.get_running_loop().create_future()

    async def beat(self) -> None:
        """For ever, or until the run is another worker's."""
        while True:
            try:
                self._obey(await self._active.attempt.heartbeat(self._lease_seconds, self._active.state))
            except Fenced as error:
                self._abandon(error)
                return
            except StoreUnavailable as error:
                log.warning("heartbeat failed", error=str(error))
            except Exception:
                # A fault of ours; the heart goes on beating, or another worker would take the run beside us.
                log.exception("heartbeat failed")
            await asyncio.sleep(self._lease_seconds / _BEATS_PER_LEASE)

    def _obey(self, desired: Desired) -> None:
        active = self._active
        if desired is Desired.CANCEL:
            active.control.cancel()
            if active.run is None or active.attempt.retry.waiting_for:
                # There is no step that could end well: it is preparing, or waiting for what may never come back.
                self._abandon(None)
        elif desired is Desired.PAUSE:
            active.control.pause()
        else:
            active.control.resume()

    def _abandon(self, fenced: Fenced | None) -> None:
        if not self.abandoned.done():
            self.abandoned.set_result(fenced)
