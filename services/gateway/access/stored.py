"""How many bytes of the store each tenant has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from foundry.store import CartridgeStore
from foundry.store.upkeep.usage import Usage


class StoredBytes:
    """As the last look found it, and what this gateway put since: a look lists all blobs, which no request can wait
    for."""

    def __init__(self) -> None:
        self._found: Mapping[str, int] = {}
        self._put: Counter[str] = Counter()

    def of(self, tenant: str | None) -> int:
        """None: of all tenants together."""
        return sum(sum(each.values()) if tenant is None else each.get(tenant, 0) for each in (self._found, self._put))

    @contextmanager
    def putting(self, tenant: str, num_bytes: int) -> Iterator[None]:
        """They count from the beginning, so that what is put at one time is not taken for little."""
        self._put[tenant] += num_bytes
        try:
            yield
        except BaseException:
            self._put[tenant] -= num_bytes
            raise

    async def look(self, store: CartridgeStore) -> Usage:
        """What is put during a look may count twice until the next one, but never not at all."""
        put_before = self._put.copy()
        usage = await store.usage()
        self._found = usage.tenant_bytes
        self._put.subtract(put_before)
        return usage
