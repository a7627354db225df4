"""Loads new versions of what this server serves as they are published. A hint: losing one costs time, nothing else.

One task follows the store's events, another loads what they name, one cartridge at a time. Requests name their digest
and fetch it themselves, so that nothing here can change an answer.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable

import structlog
from opentelemetry import trace

from foundry.errors import StoreUnavailable
from foundry.store import CartridgeId, Published
from foundry.tasks import end
from foundry.telemetry.traces import context_of
from foundry.v1 import common_pb2
from services.rollout import metrics
from services.rollout.residency import Residency

log = structlog.get_logger(__name__)
_tracer = trace.get_tracer(__name__)

# Longer than a step of the largest runs, so that a training run stays known between two of its versions.
_LATELY_SECONDS = 3600.0
_WAITING_NAMES = 64
_BACK_OFF_SECONDS = 0.1
_MAX_BACK_OFF_SECONDS = 10.0

# Events after an id; ends with StoreUnavailable.
Subscribe = Callable[[str], AsyncIterator[Published]]


class Prefetch:
    """Used from the event loop only."""

    def __init__(self, residency: Residency, subscribe: Subscribe) -> None:
        self._residency = residency
        self._subscribe = subscribe
        # Name -> its newest version and who published it (traceparent), those that have waited longest first.
        self._waiting: OrderedDict[str, tuple[CartridgeId, str]] = OrderedDict()
        self._wanted = asyncio.Event()
        self._last_event_id = "$"
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._work())]

    async def close(self) -> None:
        await end(*self._tasks)

    def announce(self, cartridge: CartridgeId, traceparent: str = "") -> None:
        """Load it when its turn comes, if its name is served here; in the trace of its publication."""
        if not self._residency.served_within(cartridge.name, _LATELY_SECONDS):
            return
        waiting = self._waiting.get(cartridge.name)
        if waiting is not None and waiting[0].version >= cartridge.version:
            return
        self._waiting[cartridge.name] = cartridge, traceparent
        if len(self._waiting) > _WAITING_NAMES:
            self._waiting.popitem(last=False)
            metrics.CARTRIDGE_PREFETCHES.labels("dropped").inc()
        self._wanted.set()

    async def _follow(self) -> None:
        back_off_seconds = _BACK_OFF_SECONDS
        while True:
            try:
                async for published in self._subscribe(self._last_event_id):
                    back_off_seconds = _BACK_OFF_SECONDS
                    self._last_event_id = published.event_id
                    self.announce(published.cartridge, published.traceparent)
            except StoreUnavailable as error:
                log.warning("events interrupted", error=error.message, retry_after_seconds=back_off_seconds)
                # Not all servers at once, when the store is back.
                await asyncio.sleep(back_off_seconds * random.uniform(0.5, 1))
                back_off_seconds = min(2 * back_off_seconds, _MAX_BACK_OFF_SECONDS)

    async def _work(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            while self._waiting:
                _, (cartridge, traceparent) = self._waiting.popitem(last=False)
                with _tracer.start_as_current_span("prefetch", context_of(traceparent)):
                    await self._load(cartridge)

    async def _load(self, cartridge: CartridgeId) -> None:
        named = common_pb2.CartridgeId(name=cartridge.name, version=cartridge.version, digest=cartridge.digest)
        try:
            already_resident = await self._residency.prefetch(named)
        except Exception as error:
            # Whatever it was, whoever asks for the cartridge meets it again and is told.
            log.warning("not prefetched", cartridge=str(cartridge), error=str(error))
            metrics.CARTRIDGE_PREFETCHES.labels("failed").inc()
        else:
            metrics.CARTRIDGE_PREFETCHES.labels("resident" if already_resident else "loaded").inc()
