"""How much of the store a tenant may take: bytes, runs that are not over, and the steps of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from foundry.errors import InvalidArgument, ResourceExhausted
from foundry.store import RunSpec, RunStore
from foundry.store.api_keys import KeyLimits
from services.gateway import metrics
from services.gateway.access.principal import Principal
from services.gateway.access.stored import StoredBytes


class Quotas:
    """`defaults` are for what a key has no limit of its own for. Where there are no keys all is of the tenant ""."""

    def __init__(self, runs: RunStore, stored: StoredBytes, defaults: KeyLimits) -> None:
        self._runs = runs
        self._stored = stored
        self._defaults = defaults

    async def check_runs(self, principal: Principal) -> None:
        """Raises ResourceExhausted if the tenant may not have one more run."""
        most = principal.limits.or_else(self._defaults).concurrent_runs
        if most is not None:
            with _counted("concurrent_runs"):
                await self._runs.check_open(principal.tenant or "", most)

    async def create_run(self, principal: Principal, spec: RunSpec) -> str:
        """Raises ResourceExhausted, also where others made theirs since `check_runs`."""
        most = principal.limits.or_else(self._defaults).concurrent_runs
        with _counted("concurrent_runs"):
            return await self._runs.create(spec, tenant=principal.tenant or "", most_open=most)

    def check_steps(self, principal: Principal, num_steps: int) -> None:
        """Raises InvalidArgument: such a run is never taken, however long the caller waits."""
        most = principal.limits.or_else(self._defaults).steps_per_run
        if most is not None and num_steps > most:
            metrics.LIMITED.labels("steps_per_run").inc()
            raise InvalidArgument(f"{num_steps} steps were asked for, the limit is {most}", field="num_steps")

    def check_stored(self, principal: Principal, num_bytes: int = 1) -> None:
        """Raises ResourceExhausted if the tenant may not have so many more."""
        most, used = principal.limits.or_else(self._defaults).stored_bytes, self._stored.of(principal.tenant)
        if most is not None and used + num_bytes > most:
            metrics.LIMITED.labels("stored_bytes").inc()
            raise ResourceExhausted(
                f"documents and durable cartridges have {used} bytes, and {num_bytes} more would be beyond the limit, "
                f"{most}: delete some"
            )

    @contextmanager
    def storing(self, principal: Principal, num_bytes: int) -> Iterator[None]:
        """Around the putting of a document. Raises ResourceExhausted."""
        self.check_stored(principal, num_bytes)
        with self._stored.putting(principal.tenant or "", num_bytes):
            yield


@contextmanager
def _counted(limit: str) -> Iterator[None]:
    try:
        yield
    except ResourceExhausted:
        metrics.LIMITED.labels(limit).inc()
        raise
