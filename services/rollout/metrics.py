"""What the rollout service reports about cartridges and KV memory; what the engine does stands in engine_metrics.py."""

from prometheus_client import Counter, Gauge, Histogram

ENGINE = Gauge("foundry_engine_info", "1 for the engine that decodes: torch or vllm.", ["engine"])
RESIDENT_CARTRIDGES = Gauge("foundry_resident_cartridges", "Cartridges in memory: device or host.", ["tier"])
RESIDENT_BYTES = Gauge("foundry_resident_cartridge_bytes", "Memory that resident cartridges take.", ["tier"])
BUDGET_BYTES = Gauge("foundry_cartridge_budget_bytes", "Most memory that resident cartridges may take.", ["tier"])
CARTRIDGE_EVICTIONS = Counter("foundry_cartridge_evictions", "Cartridges dropped to make room for others.", ["tier"])
CARTRIDGE_HITS = Counter(
    "foundry_cartridge_hits",
    "Cartridges asked for, by where they were found: device, host or store. One on its way counts once.",
    ["tier"],
)
CARTRIDGE_LOAD_ERRORS = Counter("foundry_cartridge_load_errors", "Cartridges that could not be made resident.")
CARTRIDGE_PREFETCHES = Counter(
    "foundry_cartridge_prefetches",
    "New versions of names served here, by what became of the hint: loaded, resident, dropped or failed.",
    ["result"],
)
CARTRIDGE_FETCH_SECONDS = Histogram(
    "foundry_cartridge_fetch_seconds",
    "Time to fetch a cartridge from the store and verify it.",
    buckets=(0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
)
KV_SLOTS = Gauge("foundry_kv_slots", "Slots of the KV memory: most sequences in the batch.")
KV_SLOTS_USED = Gauge("foundry_kv_slots_used", "Slots that running sequences hold.")
KV_BYTES = Gauge("foundry_kv_bytes", "KV memory of all slots; cartridges have their own.")
KV_USED_BYTES = Gauge("foundry_kv_used_bytes", "KV memory that running sequences have filled.")

for _tier in ("device", "host", "store"):
    CARTRIDGE_HITS.labels(_tier)
for _tier in ("device", "host"):
    CARTRIDGE_EVICTIONS.labels(_tier)
for _result in ("loaded", "resident", "dropped", "failed"):
    CARTRIDGE_PREFETCHES.labels(_result)
