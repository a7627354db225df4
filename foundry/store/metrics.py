"""What the store reports on /metrics, in every process that has one open."""

from prometheus_client import Counter, Gauge, Histogram

from foundry.errors import FoundryError, StoreUnavailable

STAGE_SECONDS = Histogram(
    "foundry_store_stage_seconds",
    "Time of one stage of publishing a version (send and hash, side by side; durable: blob and manifest; commit; "
    "total) or fetching one (receive and hash, side by side; verify: what the hash takes after the last byte; total).",
    ["operation", "stage"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)
BYTES = Counter(
    "foundry_store_bytes",
    "Bytes of cartridges moved: sent or received; hot is Redis, durable object storage.",
    ["direction", "tier"],
)
PUBLISHED = Counter("foundry_store_versions_published", "Versions that became visible.", ["durable"])
FETCHED = Counter("foundry_store_versions_fetched", "Versions read, by where they were found.", ["tier"])
MISMATCHES = Counter(
    "foundry_store_digest_mismatches", "Copies that were refused because their bytes are not what they claim.", ["tier"]
)
UNREADABLE = Counter(
    "foundry_store_unreadable_records",
    "Records in Redis or object storage that a list or a sweep passed over because they can't be read; "
    "`foundry store verify` names them.",
    ["kind"],
)
LEASES = Gauge("foundry_store_leases", "Leases on versions that this process holds.")
REDIS_UP = Gauge("foundry_store_redis_up", "Whether Redis answered the last command: 1 or 0.")
REDIS_SECONDS = Histogram(
    "foundry_store_redis_seconds",
    "Time of one atomic step in Redis, the way there and back included.",
    buckets=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
)
REDIS_ERRORS = Counter(
    "foundry_store_redis_errors", "Commands that Redis or the way to it failed, by type of error.", ["reason"]
)
REDIS_RETURNS = Counter("foundry_store_redis_returns", "Times that Redis answered again after it did not.")
REBUILDS = Counter("foundry_store_rebuilds", "Times that this process restored the pointers of an emptied Redis.")

for _operation, _stages in (
    ("publish", ("send", "hash", "durable", "commit", "total")),
    ("fetch", ("receive", "hash", "verify", "total")),
):
    for _stage in _stages:
        STAGE_SECONDS.labels(_operation, _stage)
for _tier in ("hot", "durable"):
    FETCHED.labels(_tier)
    MISMATCHES.labels(_tier)
    for _direction in ("sent", "received"):
        BYTES.labels(_direction, _tier)
for _kind in ("api_key", "cartridge", "document", "grant", "manifest", "mark", "pointer", "run", "tag"):
    UNREADABLE.labels(_kind)
for _durable in ("true", "false"):
    PUBLISHED.labels(_durable)
for _reason in ("STORE_UNAVAILABLE", "STORE_REFUSED", "STORE_FULL"):
    REDIS_ERRORS.labels(_reason)


class _Redis:
    """Whether Redis answers this process."""

    def __init__(self) -> None:
        self._away = False

    def answered(self) -> None:
        if self._away:
            REDIS_RETURNS.inc()
        self._away = False
        REDIS_UP.set(1)

    def failed(self, error: FoundryError) -> None:
        REDIS_ERRORS.labels(error.reason).inc()
        # A full one answers.
        if isinstance(error, StoreUnavailable):
            self._away = True
            REDIS_UP.set(0)


REDIS = _Redis()
