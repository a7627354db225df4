"""A regular look at how much the store holds, for /metrics. Every gateway reports the same: take the largest."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from prometheus_client import Gauge

from foundry.errors import FoundryError
from foundry.store.upkeep.usage import Usage

log = structlog.get_logger(__name__)

NAMES = Gauge("foundry_store_names", "Names of cartridges.")
HOT_VERSIONS = Gauge("foundry_store_hot_versions", "Versions whose bytes are in Redis.")
HOT_BYTES = Gauge("foundry_store_hot_bytes", "Bytes of cartridges in Redis; versions of equal bytes share them.")
DURABLE_VERSIONS = Gauge("foundry_store_durable_versions", "Versions that are in object storage.")
DURABLE_BYTES = Gauge("foundry_store_durable_bytes", "Bytes of cartridges in object storage, unswept garbage included.")
REDIS_USED_BYTES = Gauge("foundry_store_redis_used_bytes", "Memory that Redis uses.")
REDIS_MAX_BYTES = Gauge("foundry_store_redis_max_bytes", "Most memory that Redis takes (`maxmemory`); 0: no limit.")
RUNS = Gauge("foundry_store_runs", "Runs that wait for a worker (queued), and those that have one (held).", ["state"])
TIMESTAMP = Gauge("foundry_store_census_timestamp_seconds", "When all this was looked at, in Unix time.")

for _state in ("queued", "held"):
    RUNS.labels(_state)


async def watch(look: Callable[[], Awaitable[Usage]], period_seconds: float) -> None:
    """Look now and every `period_seconds`, until cancelled. What can't be known now keeps its last value."""
    while True:
        try:
            _report(await look())
        except FoundryError as error:
            log.warning("store not looked at", error=error.message)
        except Exception:
            # A fault of ours, which must not end the looks without a word.
            log.exception("store not looked at")
        await asyncio.sleep(period_seconds)


def _report(usage: Usage) -> None:
    NAMES.set(usage.names)
    HOT_VERSIONS.set(usage.hot_versions)
    HOT_BYTES.set(usage.hot_bytes)
    DURABLE_VERSIONS.set(usage.durable_versions)
    DURABLE_BYTES.set(usage.durable_bytes)
    REDIS_USED_BYTES.set(usage.redis_used_bytes)
    REDIS_MAX_BYTES.set(usage.redis_max_bytes)
    RUNS.labels("queued").set(usage.queued_runs)
    RUNS.labels("held").set(usage.held_runs)
    TIMESTAMP.set_to_current_time()
