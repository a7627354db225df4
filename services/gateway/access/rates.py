"""How much a caller may ask in a minute and at one time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import Literal

from foundry.errors import ResourceExhausted
from foundry.store.api_keys import KeyLimits
from foundry.tasks import end
from services.gateway import metrics
from services.gateway.access.counters import Counters
from services.gateway.access.principal import Principal
from services.gateway.access.window import Window, duration


class Rates:
    """`defaults` are for what a key has no limit of its own for."""

    def __init__(self, counters: Counters, defaults: KeyLimits) -> None:
        self._counters = counters
        self._defaults = defaults
        self._num_in_flight: Counter[str] = Counter()
        self._counting: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        await end(*self._counting)

    @asynccontextmanager
    async def admitted(self, principal: Principal, headers: dict[str, str], *, completion: bool) -> AsyncIterator[None]:
        """One request, from before its body is read until it is answered; `headers` become those of its answer.

        Raises ResourceExhausted. What is refused is not counted.
        """
        limits = principal.limits.or_else(self._defaults)
        with self._in_flight(principal, limits.concurrent_requests) if completion else nullcontext():
            if completion and limits.tokens_per_minute is not None:
                tokens = await self._counters.window(_tokens_of(principal), limits.tokens_per_minute)
                headers |= tokens.headers("tokens")
                if tokens.seconds_until_room != 0:
                    raise _used_up(tokens, "tokens")
            if limits.requests_per_minute is not None:
                name, most = f"requests/{principal.client}", limits.requests_per_minute
                taken = await self._counters.take(name, most)
                requests = await self._counters.window(name, most)
                headers |= requests.headers("requests")
                if not taken:
                    raise _used_up(requests, "requests")
            yield

    async def spent(self, principal: Principal, num_tokens: int) -> None:
        """Count tokens of an answer that has ended. They are counted also if the caller is cancelled meanwhile."""
        if num_tokens and principal.limits.or_else(self._defaults).tokens_per_minute is not None:
            counting = asyncio.create_task(self._counters.add(_tokens_of(principal), num_tokens))
            self._counting.add(counting)
            counting.add_done_callback(self._counting.discard)
            await asyncio.shield(counting)

    @contextmanager
    def _in_flight(self, principal: Principal, most: int | None) -> Iterator[None]:
        if most is not None and self._num_in_flight[principal.client] >= most:
            metrics.LIMITED.labels("concurrent_requests").inc()
            # Nobody knows when one of them will end.
            raise ResourceExhausted(
                f"the limit is {most} completions at one time, and as many are being answered: wait for one of them"
            )
        self._num_in_flight[principal.client] += 1
        try:
            yield
        finally:
            self._num_in_flight[principal.client] -= 1
            if not self._num_in_flight[principal.client]:
                del self._num_in_flight[principal.client]


def _tokens_of(principal: Principal) -> str:
    return f"tokens/{principal.client}"


def _used_up(window: Window, kind: Literal["requests", "tokens"]) -> ResourceExhausted:
    wait = window.seconds_until_room
    when = "this key may use none" if wait is None else f"try again in {duration(wait)}"
    metrics.LIMITED.labels(f"{kind}_per_minute").inc()
    return ResourceExhausted(
        f"the limit is {window.most} {kind} in {duration(window.seconds)}, and they are used up: {when}",
        retry_after_seconds=wait,
    )
