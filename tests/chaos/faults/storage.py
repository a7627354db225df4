"""Object storage that goes wrong: a real store of files behind a seam where calls can be tampered with."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from foundry.errors import StoreUnavailable
from foundry.identity import Buffer
from foundry.store import Objects
from tests.chaos.faults.fault import Fault

T = TypeVar("T")
Call = Callable[[], Awaitable[Any]]
# Does one call, or not, or twice, and says what came of it.
Tamper = Callable[[Call], Awaitable[Any]]

_TIMEOUT_SECONDS = 0.02


@dataclass(frozen=True)
class _Armed:
    fault: Fault
    tamper: Tamper
    # Only keys that start so.
    prefix: str


class ObjectsSeam:
    """Opens stores in the place of `Objects.open`; all of them share what is armed here."""

    def __init__(self) -> None:
        self._puts: list[_Armed] = []
        self._gets: list[_Armed] = []
        self._late: set[asyncio.Task[Any]] = set()

    def open(self, url: str, **options: Any) -> Objects:
        return _Tampered(Objects.open(url, **options), self)

    def arm_put(self, fault: Fault, tamper: Tamper) -> None:
        self._puts.append(_Armed(fault, tamper, ""))

    def arm_get(self, fault: Fault, tamper: Tamper, *, prefix: str = "") -> None:
        self._gets.append(_Armed(fault, tamper, prefix))

    def disarm(self) -> None:
        self._puts.clear()
        self._gets.clear()

    async def settle(self) -> None:
        """Return when every late put has landed."""
        await asyncio.gather(*self._late, return_exceptions=True)

    def late(self, call: Call) -> None:
        """Let a put land when its writer has long gone on to others."""

        async def land() -> None:
            await asyncio.sleep(_TIMEOUT_SECONDS)
            await call()

        task = asyncio.create_task(land())
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    async def put(self, key: str, call: Call) -> Any:
        return await self._do(self._puts, key, call)

    async def get(self, key: str, call: Call) -> Any:
        return await self._do(self._gets, key, call)

    async def _do(self, armed: list[_Armed], key: str, call: Call) -> Any:
        found = next((each for each in armed if key.startswith(each.prefix)), None)
        if found is None:
            return await call()
        armed.remove(found)
        found.fault.fired, found.fault.detail = True, key
        return await found.tamper(call)


class _Tampered(Objects):
    def __init__(self, real: Objects, seam: ObjectsSeam) -> None:
        # The same store, opened once.
        self.__dict__.update(vars(real))
        self._seam = seam

    async def put(self, key: str, parts: Iterable[Buffer]) -> None:
        # A put that is done twice needs its bytes twice.
        parts = list(parts)
        await self._seam.put(key, lambda: Objects.put(self, key, parts))

    async def put_if_absent(self, key: str, content: bytes) -> bool:
        return bool(await self._seam.put(key, lambda: Objects.put_if_absent(self, key, content)))

    async def get(self, key: str, *, max_bytes: int | None = None) -> memoryview:
        return memoryview(await self._seam.get(key, lambda: Objects.get(self, key, max_bytes=max_bytes)))

    async def get_range(self, key: str, begin: int, end: int) -> memoryview:
        return memoryview(await self._seam.get(key, lambda: Objects.get_range(self, key, begin, end)))


async def refused(call: Call) -> Any:
    raise StoreUnavailable("object storage refused the call (fault)")


async def timed_out(call: Call) -> Any:
    await asyncio.sleep(_TIMEOUT_SECONDS)
    raise StoreUnavailable("object storage did not answer (fault)")


async def repeated(call: Call) -> Any:
    """The transport sent it again; the answer is the second one's."""
    await call()
    return await call()


async def reply_lost(call: Call) -> Any:
    await call()
    raise StoreUnavailable("object storage did it and its answer was lost (fault)")


def overtaken(seam: ObjectsSeam) -> Tamper:
    """Given up by its writer, and done nevertheless, after the puts that follow."""

    async def tamper(call: Call) -> Any:
        seam.late(call)
        raise StoreUnavailable("object storage did not answer in time (fault)")

    return tamper


def truncated(rng: random.Random) -> Tamper:
    share = rng.random()

    async def tamper(call: Call) -> Any:
        content = await call()
        return content[: int(len(content) * share)]

    return tamper


def flipped(rng: random.Random) -> Tamper:
    share, bit = rng.random(), rng.randrange(8)

    async def tamper(call: Call) -> Any:
        content = bytearray(await call())
        if content:
            content[int(len(content) * share)] ^= 1 << bit
        return bytes(content)

    return tamper
