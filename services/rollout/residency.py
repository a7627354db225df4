"""Which cartridges are in memory, by digest.

What is not resident is fetched by its digest and verified, and nothing else is ever used in its place. A cartridge
stays while sequences use it; of the others the least recently used make room when the byte budget is reached.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from foundry.cartridge import Cartridge
from foundry.errors import Conflict, InvalidArgument, ResourceExhausted
from foundry.identity import DTYPE_BYTES, CartridgeBytes, check_digest
from foundry.lm import ModelSpec
from foundry.v1.common_pb2 import CartridgeId
from services.rollout import metrics
from services.rollout.engine import Engine

log = structlog.get_logger(__name__)

_RETRY_AFTER_SECONDS = 1.0


class CartridgeSource(Protocol):
    """Where cartridges come from: the store."""

    async def fetch(self, digest: str) -> CartridgeBytes:
        """Raises CartridgeNotFound."""
        ...


@dataclass(slots=True)
class Resident:
    """A cartridge in memory; `references` counts the sequences that use it."""

    digest: str
    # As the latest caller named it, for people to read.
    named: CartridgeId
    num_tokens: int
    num_bytes: int
    references: int = 0


class Hold:
    """Resident cartridges that stay until `release`. `num_tokens` is of each digest."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._taken: list[tuple[Resident, int]] = []
        self.num_tokens: dict[str, int] = {}

    def take(self, resident: Resident, references: int) -> None:
        resident.references += references
        self._taken.append((resident, references))
        self.num_tokens[resident.digest] = resident.num_tokens

    def release(self) -> None:
        while self._taken:
            resident, references = self._taken.pop()
            resident.references -= references


class Residency:
    """Used from the event loop only."""

    def __init__(
        self, spec: ModelSpec, source: CartridgeSource, engine: Engine, *, budget_bytes: int, element_bytes: int
    ) -> None:
        """`element_bytes` is the size of a number in the engine, which may widen a cartridge's own dtype."""
        self._spec = spec
        self._source = source
        self._engine = engine
        self.budget_bytes = budget_bytes
        self._element_bytes = element_bytes
        # Least recently used first.
        self._residents: OrderedDict[str, Resident] = OrderedDict()
        self._loads: dict[str, asyncio.Task[None]] = {}
        # Of cartridges that are verified and on their way into the engine.
        self._reserved_bytes = 0

    async def hold(self, cartridges: Sequence[tuple[CartridgeId, int]]) -> Hold:
        """Make the cartridges resident, each with a number of references, until the hold is released.

        Raises CartridgeNotFound, DigestMismatch, ShapeMismatch, ResourceExhausted and what the store raises.
        """
        hold = Hold(self)
        try:
            for cartridge, references in cartridges:
                await self.load(cartridge)
                hold.take(self._residents[cartridge.digest], references)
        except BaseException:
            hold.release()
            raise
        return hold

    async def load(self, cartridge: CartridgeId) -> bool:
        """Make a cartridge resident; concurrent calls share one fetch. True if it was there already."""
        digest = check_digest(cartridge.digest)
        already_resident = digest in self._residents
        # Again if it was evicted between the end of its load and this task's turn.
        while digest not in self._residents:
            if (task := self._loads.get(digest)) is None:
                task = self._loads[digest] = asyncio.create_task(self._load(cartridge))
                task.add_done_callback(lambda done: self._loaded(digest, done))
            # Shielded: the first caller may go away while others still wait.
            await asyncio.shield(task)
        self._residents.move_to_end(digest)
        self._residents[digest].named = cartridge
        return already_resident

    def unload(self, digest: str) -> None:
        """Forget a cartridge; one that is not resident is none. Raises Conflict while sequences use it."""
        check_digest(digest)
        if (resident := self._residents.get(digest)) is None:
            return
        if resident.references:
            raise Conflict(f"{resident.references} sequences are decoding with cartridge {digest}")
        self._forget(resident)

    def residents(self) -> Sequence[Resident]:
        return list(self._residents.values())

    async def close(self) -> None:
        loads = list(self._loads.values())
        for task in loads:
            task.cancel()
        await asyncio.gather(*loads, return_exceptions=True)

    async def _load(self, named: CartridgeId) -> None:
        digest = named.digest
        with metrics.CARTRIDGE_FETCH_SECONDS.time():
            stored = await self._source.fetch(digest)
            await asyncio.to_thread(stored.verify, digest)
        header = stored.header
        self._spec.check(header)
        num_bytes = header.num_bytes // DTYPE_BYTES[header.dtype] * self._element_bytes
        self._make_room(digest, num_bytes)
        self._reserved_bytes += num_bytes
        try:
            cartridge = await asyncio.to_thread(Cartridge.from_bytes, stored)
            await asyncio.to_thread(self._engine.load, digest, cartridge)
        finally:
            self._reserved_bytes -= num_bytes
        self._residents[digest] = Resident(digest, named, header.num_tokens, num_bytes)
        self._observe()
        log.info("cartridge loaded", digest=digest, num_tokens=header.num_tokens, num_bytes=num_bytes)

    def _loaded(self, digest: str, task: asyncio.Task[None]) -> None:
        del self._loads[digest]
        # Every caller may have gone away: look at the error, so that asyncio doesn't complain that nobody did.
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("cartridge not loaded", digest=digest, error=str(error))

    def _make_room(self, digest: str, num_bytes: int) -> None:
        if num_bytes > self.budget_bytes:
            raise InvalidArgument(
                f"cartridge {digest} takes {num_bytes} bytes, the budget for all is {self.budget_bytes}",
                field="cartridges",
            )
        residents = self.residents()
        in_use = self._reserved_bytes + sum(resident.num_bytes for resident in residents if resident.references)
        if in_use + num_bytes > self.budget_bytes:
            raise ResourceExhausted(
                f"no room for cartridge {digest} of {num_bytes} bytes: "
                f"{in_use} of {self.budget_bytes} are taken by cartridges in use",
                retry_after_seconds=_RETRY_AFTER_SECONDS,
            )
        idle = (resident for resident in residents if not resident.references)
        while self._used_bytes() + num_bytes > self.budget_bytes:
            self._forget(next(idle))
            metrics.CARTRIDGE_EVICTIONS.inc()

    def _used_bytes(self) -> int:
        return self._reserved_bytes + sum(resident.num_bytes for resident in self._residents.values())

    def _forget(self, resident: Resident) -> None:
        del self._residents[resident.digest]
        self._engine.unload(resident.digest)
        self._observe()

    def _observe(self) -> None:
        metrics.RESIDENT_CARTRIDGES.set(len(self._residents))
        metrics.RESIDENT_BYTES.set(sum(resident.num_bytes for resident in self._residents.values()))
