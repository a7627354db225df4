"""Processes that may be killed at any moment and are started again at once, as a supervisor would."""

from __future__ import annotations

import asyncio
from typing import Protocol

from foundry.rpc.channel import open_channel, wait_until_serving
from tests.process import Process
from tests.valkey import Valkey

# Several may be starting at once, beside a run that goes on.
_COMING_UP_SECONDS = 300.0


class Victim(Protocol):
    """What a killer needs to know of a process. `up` is set while it serves."""

    name: str
    up: asyncio.Event

    async def kill(self) -> None:
        """SIGKILL and start again; returns before it serves. Fails if the process had ended by itself."""

    async def close(self) -> None:
        """Stop watching; the process stays as it is."""


class KilledService:
    """A gRPC service: rollout, teacher or trainer."""

    def __init__(self, name: str, process: Process) -> None:
        self.name = name
        self.up = asyncio.Event()
        self._process = process
        self._coming_up = asyncio.create_task(self._watch())

    async def kill(self) -> None:
        self._process.check_alive()
        await self.close()
        self.up.clear()
        self._process.kill()
        self._process.start()
        self._coming_up = asyncio.create_task(self._watch())

    async def close(self) -> None:
        self._coming_up.cancel()
        await asyncio.gather(self._coming_up, return_exceptions=True)

    async def _watch(self) -> None:
        async with open_channel(self._process.address) as channel:
            await wait_until_serving(channel, self.name, timeout_seconds=_COMING_UP_SECONDS)
        self.up.set()


class KilledValkey:
    """Valkey with an append-only file, which a kill leaves or takes with it."""

    def __init__(self, name: str, valkey: Valkey, *, loses_data: bool) -> None:
        self.name = name
        self.up = asyncio.Event()
        self.up.set()
        # Odd while the server is coming back empty, even otherwise.
        self.losses = 0
        self._valkey = valkey
        self._loses_data = loses_data

    async def kill(self) -> None:
        if self._loses_data:
            self.losses += 1
            self._valkey.lose()
            await self._valkey.start()
            self.losses += 1
        else:
            await self._valkey.restart()

    async def close(self) -> None:
        pass
