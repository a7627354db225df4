"""Which cartridges are in memory, by digest.

What is not on the device comes from host memory, else from the store by its digest and verified; nothing else is ever
used in its place. Old and new versions are resident side by side: a load pauses nobody. So are a cartridge and copies
of it whose keys stand further on: each is a resident like any other.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import structlog
from opentelemetry import trace

from foundry.errors import ContextLengthExceeded, DigestMismatch, RopeUnsupported
from foundry.identity import DTYPE_BYTES, CartridgeBytes, CartridgeHeader, check_digest
from foundry.model.cartridge import Cartridge
from foundry.model.info import ModelSpec
from foundry.tasks import end
from foundry.v1.common_pb2 import CartridgeId
from services.rollout import metrics
from services.rollout.copies import key_of, moved
from services.rollout.engine import Engine
from services.rollout.tiers import DeviceTier, HostTier, Resident

log = structlog.get_logger(__name__)
_tracer = trace.get_tracer(__name__)

_SERVED_NAMES = 1024


class CartridgeSource(Protocol):
    """Where cartridges come from: the store."""

    async def header(self, digest: str) -> CartridgeHeader:
        """What the bytes are said to be, unverified: how much room they need. Raises CartridgeNotFound."""
        ...

    async def fetch(self, digest: str) -> CartridgeBytes:
        """The bytes, verified against their digest. Raises CartridgeNotFound, DigestMismatch."""
        ...


class Hold:
    """Resident cartridges that stay until `release`. `num_tokens` is of each digest."""

    def __init__(self) -> None:
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
        self,
        spec: ModelSpec,
        source: CartridgeSource,
        engine: Engine,
        *,
        budget_bytes: int,
        host_budget_bytes: int,
        element_bytes: int,
    ) -> None:
        """`element_bytes` is the size of a number in the engine, which may widen a cartridge's own dtype."""
        self.device = DeviceTier(engine, budget_bytes)
        self.host = HostTier(host_budget_bytes)
        self._spec = spec
        self._source = source
        self._engine = engine
        self._element_bytes = element_bytes
        # One copy at a time is beside what the tiers count.
        self._moving = asyncio.Lock()
        self._loads: dict[str, asyncio.Task[None]] = {}
        # Name -> when it was last asked for (monotonic seconds), the latest one last.
        self._served: OrderedDict[str, float] = OrderedDict()

    async def hold(
        self,
        cartridges: Sequence[tuple[CartridgeId, int]],
        stacks: Sequence[tuple[Sequence[CartridgeId], int]] = (),
    ) -> Hold:
        """Make the cartridges resident, each with a number of references, until the hold is released; and those of
        stacks, each with its keys behind the ones before it.

        Raises what `load` raises.
        """
        hold = Hold()
        try:
            with _tracer.start_as_current_span("cartridges"):
                for cartridge, references in cartridges:
                    await self.load(cartridge)
                    hold.take(self.device.use(cartridge.digest), references)
                for stack, references in stacks:
                    shift = 0
                    for cartridge in stack:
                        await self.load(cartridge, shift)
                        hold.take(self.device.use(key_of(cartridge.digest, shift)), references)
                        shift += hold.num_tokens[cartridge.digest]
        except BaseException:
            hold.release()
            raise
        return hold

    async def load(self, cartridge: CartridgeId, shift: int = 0) -> bool:
        """Make a cartridge resident, or a copy whose keys are moved by `shift`; concurrent calls share one load. True
        if it was there already.

        Raises CartridgeNotFound, DigestMismatch, ShapeMismatch, InvalidArgument and ResourceExhausted if there is no
        room for it, RopeUnsupported, ContextLengthExceeded if keys were moved out of the model's context, and what the
        store raises.
        """
        self._note_served(cartridge.name)
        already_resident = await self.prefetch(cartridge, shift)
        if already_resident:
            metrics.CARTRIDGE_HITS.labels("device").inc()
        # Each keeps its place by use, not by when it came: what leaves the device last was in the host tier last.
        self.host.use(cartridge.digest)
        return already_resident

    async def prefetch(self, cartridge: CartridgeId, shift: int = 0) -> bool:
        """`load` for nobody in particular: it is not noted as a use of the name."""
        key = key_of(check_digest(cartridge.digest), shift)
        already_resident = key in self.device
        # Again if it was evicted between the end of its load and this task's turn.
        while key not in self.device:
            # One that is done may stand there until its callback has its turn, which waiting for it does not give.
            if (task := self._loads.get(key)) is None or task.done():
                task = self._loads[key] = asyncio.create_task(self._load(cartridge, shift))
                task.add_done_callback(lambda done: self._loaded(key, done))
            # Shielded: the first caller may go away while others still wait.
            await asyncio.shield(task)
        self.device.use(key).named = cartridge
        return already_resident

    def served_within(self, name: str, seconds: float) -> bool:
        """Whether somebody asked for a cartridge of this name so lately."""
        served_at = self._served.get(name)
        return served_at is not None and time.monotonic() - served_at <= seconds

    async def close(self) -> None:
        await end(*self._loads.values())

    async def _load(self, named: CartridgeId, shift: int) -> None:
        digest, key = named.digest, key_of(named.digest, shift)
        kept = self.host.get(digest)
        header = kept.stored.header if kept is not None else await self._source.header(digest)
        # Before any byte is moved, or anything evicted for it.
        self._spec.check(header)
        self._check_shift(header, shift)
        num_bytes = header.num_bytes // DTYPE_BYTES[header.dtype] * self._element_bytes
        with self.device.loading(key, num_bytes):
            async with self.host.moving(digest, header.num_bytes) as found:
                stored = found or await self._fetch(digest, header)
                cartridge = await asyncio.to_thread(Cartridge.from_bytes, stored)
                await self._hand_over(key, cartridge, shift)
                self.host.keep(named, stored)
            self.device.add(Resident(digest, named, header.num_tokens, num_bytes, shift=shift))
        tier = "store" if found is None else "host"
        metrics.CARTRIDGE_HITS.labels(tier).inc()
        log.info(
            "cartridge loaded",
            name=named.name,
            version=named.version,
            digest=digest,
            shift=shift,
            num_tokens=header.num_tokens,
            num_bytes=num_bytes,
            tier=tier,
        )

    def _check_shift(self, header: CartridgeHeader, shift: int) -> None:
        if shift and isinstance(why := self._engine.rotation, str):
            raise RopeUnsupported(f"keys of cartridges can't be moved here: {why}", field="rope")
        if shift and shift + header.num_tokens > self._spec.max_tokens:
            raise ContextLengthExceeded(
                f"the cartridges have more than {shift + header.num_tokens - 1} tokens: this model's maximum context "
                f"length is {self._spec.max_tokens} tokens",
                field="cartridges",
            )

    async def _hand_over(self, key: str, cartridge: Cartridge, shift: int) -> None:
        """To the engine, moved if it is to be."""
        rotation = self._engine.rotation
        if not shift or isinstance(rotation, str):
            await asyncio.to_thread(self._engine.load, key, cartridge)
        else:
            async with self._moving:
                copy = await asyncio.to_thread(moved, cartridge, rotation, shift)
                await asyncio.to_thread(self._engine.load, key, copy)

    async def _fetch(self, digest: str, header: CartridgeHeader) -> CartridgeBytes:
        with metrics.CARTRIDGE_FETCH_SECONDS.time():
            stored = await self._source.fetch(digest)
        if stored.header != header:
            # The digest is right about the bytes that came; the room was made for what the store said of them.
            raise DigestMismatch(f"the store's note of what {digest} is differs from its verified bytes; ask again")
        return stored

    def _loaded(self, key: str, task: asyncio.Task[None]) -> None:
        if self._loads.get(key) is task:
            del self._loads[key]
        # Every caller may have gone away: look at the error, so that asyncio doesn't complain that nobody did.
        if not task.cancelled() and (error := task.exception()) is not None:
            metrics.CARTRIDGE_LOAD_ERRORS.inc()
            log.warning("cartridge not loaded", key=key, error=str(error))

    def _note_served(self, name: str) -> None:
        self._served[name] = time.monotonic()
        self._served.move_to_end(name)
        if len(self._served) > _SERVED_NAMES:
            self._served.popitem(last=False)
