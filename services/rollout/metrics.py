"""What the rollout service reports on /metrics: vLLM's names, with our prefix, where the meaning is the same."""

from prometheus_client import Counter, Gauge, Histogram

REQUESTS_RUNNING = Gauge("foundry_num_requests_running", "Sequences in the batch.")
REQUESTS_WAITING = Gauge("foundry_num_requests_waiting", "Sequences that wait for a slot.")
PROMPT_TOKENS = Counter("foundry_prompt_tokens", "Tokens of prompts whose first token was sampled.")
GENERATION_TOKENS = Counter("foundry_generation_tokens", "Tokens sampled.")
PREFIX_CACHE_HITS = Counter("foundry_prefix_cache_hits", "Prompt tokens whose KV was reused.")
TIME_TO_FIRST_TOKEN = Histogram(
    "foundry_time_to_first_token_seconds",
    "From the call's arrival, its cartridges' transfer included, to the first token of each sequence.",
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)
TIME_PER_OUTPUT_TOKEN = Histogram(
    "foundry_time_per_output_token_seconds",
    "From one token of a sequence to the next.",
    buckets=(0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
)
RESIDENT_CARTRIDGES = Gauge("foundry_resident_cartridges", "Cartridges in memory: device or host.", ["tier"])
RESIDENT_BYTES = Gauge("foundry_resident_cartridge_bytes", "Memory that resident cartridges take.", ["tier"])
CARTRIDGE_EVICTIONS = Counter("foundry_cartridge_evictions", "Cartridges dropped to make room for others.", ["tier"])
CARTRIDGE_HITS = Counter(
    "foundry_cartridge_hits",
    "Cartridges asked for, by where they were found: device, host or store. One on its way counts once.",
    ["tier"],
)
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
