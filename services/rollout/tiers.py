"""Where cartridges are kept: on the engine's device and, verified, in host memory. Each tier has a budget in bytes.

What is on its way counts in both tiers, so that memory is bounded at every moment and not only between two loads.
Both are used from the event loop only.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from foundry.errors import InvalidArgument, ResourceExhausted
from foundry.identity import CartridgeBytes
from foundry.v1.common_pb2 import CartridgeId
from services.rollout import metrics
from services.rollout.copies import key_of
from services.rollout.engine import Engine

_RETRY_AFTER_SECONDS = 1.0


@dataclass(slots=True)
class Resident:
    """A cartridge in the engine; `references` counts the sequences that use it."""

    digest: str
    # As the latest caller named it, for people to read.
    named: CartridgeId
    num_tokens: int
    num_bytes: int
    references: int = 0
    # Positions by which the engine's keys are further on than the digest's.
    shift: int = 0

    @property
    def key(self) -> str:
        return key_of(self.digest, self.shift)


class DeviceTier:
    """The engine's cartridges by its keys, moved copies among them. Those in use stay; of the others the least recently
    used make room."""

    def __init__(self, engine: Engine, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        metrics.BUDGET_BYTES.labels("device").set(budget_bytes)
        self._engine = engine
        # Least recently used first.
        self._residents: OrderedDict[str, Resident] = OrderedDict()
        self._loading_bytes = 0
        self._observe()

    def __contains__(self, key: str) -> bool:
        return key in self._residents

    def residents(self) -> Sequence[Resident]:
        return list(self._residents.values())

    def use(self, key: str) -> Resident:
        """The resident, which is now the most recently used."""
        self._residents.move_to_end(key)
        return self._residents[key]

    @contextmanager
    def loading(self, key: str, num_bytes: int) -> Iterator[None]:
        """Within it `num_bytes` are set aside for a cartridge on its way; what is idle makes room for it.

        Raises InvalidArgument if the budget can never hold it, ResourceExhausted if it can't now; then nothing was
        evicted.
        """
        self._make_room(key, num_bytes)
        self._loading_bytes += num_bytes
        try:
            yield
        finally:
            self._loading_bytes -= num_bytes

    def add(self, resident: Resident) -> None:
        """The engine has loaded it, within `loading`."""
        self._residents[resident.key] = resident
        self._observe()

    def remove(self, key: str) -> None:
        del self._residents[key]
        self._engine.unload(key)
        self._observe()

    def _make_room(self, key: str, num_bytes: int) -> None:
        if num_bytes > self.budget_bytes:
            raise InvalidArgument(
                f"cartridge {key} takes {num_bytes} bytes, the budget for all is {self.budget_bytes}",
                field="cartridges",
            )
        residents = self.residents()
        in_use = sum(resident.num_bytes for resident in residents if resident.references)
        if in_use + self._loading_bytes + num_bytes > self.budget_bytes:
            raise ResourceExhausted(
                f"no room for cartridge {key} of {num_bytes} bytes: of {self.budget_bytes} bytes {in_use} are in "
                f"use and {self._loading_bytes} are of cartridges being loaded; wait, or raise cartridge_budget_bytes",
                retry_after_seconds=_RETRY_AFTER_SECONDS,
            )
        idle = (resident for resident in residents if not resident.references)
        while self._used_bytes() + num_bytes > self.budget_bytes:
            self.remove(next(idle).key)
            metrics.CARTRIDGE_EVICTIONS.labels("device").inc()

    def _used_bytes(self) -> int:
        return self._loading_bytes + sum(resident.num_bytes for resident in self._residents.values())

    def _observe(self) -> None:
        metrics.RESIDENT_CARTRIDGES.labels("device").set(len(self._residents))
        metrics.RESIDENT_BYTES.labels("device").set(sum(resident.num_bytes for resident in self._residents.values()))


@dataclass(frozen=True, slots=True)
class Kept:
    """Verified bytes in host memory, and how the latest caller named them."""

    named: CartridgeId
    stored: CartridgeBytes

    @property
    def num_bytes(self) -> int:
        return self.stored.header.num_bytes


class HostTier:
    """Verified bytes by digest, the least recently used dropped first. They never change.

    Entries and what is on its way take at most the budget, or one cartridge if that is more: with a budget of 0
    nothing is kept and cartridges come one at a time.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        metrics.BUDGET_BYTES.labels("host").set(budget_bytes)
        # Least recently used first.
        self._entries: OrderedDict[str, Kept] = OrderedDict()
        # Coming from the store, or going to the device.
        self._moving_bytes = 0
        # First come, first served: a large cartridge is not overtaken for ever by small ones.
        self._turn = asyncio.Lock()
        self._moved = asyncio.Event()
        self._observe()

    def entries(self) -> Sequence[Kept]:
        return list(self._entries.values())

    def get(self, digest: str) -> Kept | None:
        return self._entries.get(digest)

    def use(self, digest: str) -> None:
        """Make it the most recently used, if it is here."""
        if digest in self._entries:
            self._entries.move_to_end(digest)

    @asynccontextmanager
    async def moving(self, digest: str, num_bytes: int) -> AsyncIterator[CartridgeBytes | None]:
        """The bytes of `digest`, taken out, or None if they must be fetched: then there is room for them.

        Within it they count as on their way; `keep` puts them (back) in.
        """
        if (found := self._entries.pop(digest, None)) is None:
            async with self._turn:
                while self._moving_bytes and self._moving_bytes + num_bytes > self.budget_bytes:
                    self._moved.clear()
                    await self._moved.wait()
                self._make_room(num_bytes)
                self._moving_bytes += num_bytes
        else:
            self._moving_bytes += num_bytes
        try:
            yield found.stored if found is not None else None
        finally:
            self._moving_bytes -= num_bytes
            self._moved.set()
            self._observe()

    def keep(self, named: CartridgeId, stored: CartridgeBytes) -> None:
        """At the end of `moving`: what takes the room that was made for it."""
        if stored.header.num_bytes <= self.budget_bytes:
            self._entries[named.digest] = Kept(named, stored)

    def _make_room(self, num_bytes: int) -> None:
        while self._entries and self._entry_bytes() + self._moving_bytes + num_bytes > self.budget_bytes:
            self._entries.popitem(last=False)
            metrics.CARTRIDGE_EVICTIONS.labels("host").inc()

    def _entry_bytes(self) -> int:
        return sum(kept.num_bytes for kept in self._entries.values())

    def _observe(self) -> None:
        metrics.RESIDENT_CARTRIDGES.labels("host").set(len(self._entries))
        metrics.RESIDENT_BYTES.labels("host").set(self._entry_bytes())
