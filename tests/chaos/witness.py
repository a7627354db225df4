"""A reader that watches a run all the time, across every loss of Redis, and remembers all that it was told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from foundry.errors import CartridgeNotFound, StoreUnavailable
from foundry.store import CartridgeStore
from foundry.tasks import end
from tests.e2e.training import follow

_POLL_SECONDS = 0.02


class Witness:
    """Step events, published versions, and what the name resolves to.

    `losses()` tells the lives of Redis apart: it counts up when its data goes and again when it is back, empty.
    """

    def __init__(self, store: CartridgeStore, name: str, losses: Callable[[], int]) -> None:
        self.steps: list[dict[str, Any]] = []
        # (life of Redis, version) as the name resolved, in order; and versions as they were announced, in order.
        self.resolved: list[tuple[int, int]] = []
        self.announced: list[int] = []
        # Everything that was ever told: version -> digests. More than one is a broken promise.
        self.digests: dict[int, set[str]] = {}
        self.finished: dict[str, Any] | None = None
        self._store, self._name, self._losses = store, name, losses
        self._stepped = asyncio.Condition()

    @property
    def step(self) -> int:
        return self.steps[-1]["step"] if self.steps else 0

    async def wait_for_steps(self, more: int) -> None:
        """Return when so many more steps were reported."""
        seen = len(self.steps)
        async with self._stepped:
            await self._stepped.wait_for(lambda: len(self.steps) >= seen + more or self.finished is not None)

    async def watch(self, run_id: str) -> None:
        """Until the run has ended."""
        others = [asyncio.create_task(self._watch_name()), asyncio.create_task(self._watch_announcements())]
        try:
            await self._watch_run(run_id)
            for task in others:
                # What they found wrong, rather than that they were stopped.
                if task.done():
                    task.result()
        finally:
            await end(*others)

    async def _watch_run(self, run_id: str) -> None:
        async for event in follow(self._store, run_id):
            async with self._stepped:
                if event["type"] == "step":
                    self.steps.append(event)
                    self._told(event["version"], event["digest"])
                elif event["type"] == "finished":
                    self.finished = event
                self._stepped.notify_all()

    async def _watch_name(self) -> None:
        while True:
            life = self._losses()
            try:
                found = await self._store.resolve(self._name)
            except (StoreUnavailable, CartridgeNotFound):
                pass
            else:
                self._told(found.version, found.digest)
                if self._losses() == life and life % 2 == 0:
                    self.resolved.append((life, found.version))
            await asyncio.sleep(_POLL_SECONDS)

    async def _watch_announcements(self) -> None:
        after = "0-0"
        while True:
            try:
                async for published in self._store.subscribe(after):
                    after = published.event_id
                    if published.cartridge.name == self._name:
                        self.announced.append(published.cartridge.version)
                        self._told(published.cartridge.version, published.cartridge.digest)
            except StoreUnavailable:
                await asyncio.sleep(_POLL_SECONDS)

    def _told(self, version: int, digest: str) -> None:
        self.digests.setdefault(version, set()).add(digest)
