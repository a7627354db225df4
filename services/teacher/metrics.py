"""What the teacher reports on /metrics."""

from prometheus_client import Counter, Gauge, Histogram

SCORED_TOKENS = Counter("foundry_teacher_scored_tokens", "Positions scored.")
SCORED_ANSWERS = Counter("foundry_teacher_scored_answers", "Answers scored.")
SCORE_SECONDS = Histogram(
    "foundry_teacher_micro_batch_seconds",
    "Time from the start of a micro-batch's forward until its scores are in the host's memory.",
    buckets=(0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
)
PREFILL_SECONDS = Histogram(
    "foundry_teacher_prefill_seconds",
    "Time to compute a document's KV.",
    buckets=(0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
CONTEXTS = Gauge("foundry_teacher_resident_contexts", "Documents whose KV is kept: device, host or disk.", ["tier"])
CONTEXT_BYTES = Gauge("foundry_teacher_context_bytes", "What the documents' KV takes.", ["tier"])
CONTEXT_BUDGET_BYTES = Gauge("foundry_teacher_context_budget_bytes", "Most that the documents' KV may take.", ["tier"])
CONTEXT_REQUESTS = Counter(
    "foundry_teacher_context_requests",
    "Documents that were put, by whether their KV was in any tier: hit or miss; and scores refused for want of it: "
    "absent.",
    ["result"],
)
CONTEXT_HITS = Counter(
    "foundry_teacher_context_hits",
    "Documents that were put or scored behind, once for each micro-batch, by where their KV was: device, host or disk.",
    ["tier"],
)
CONTEXT_RELOAD_SECONDS = Histogram(
    "foundry_teacher_context_reload_seconds",
    "Time until a document's KV was back on the device, with making room and what the device did before: host or disk.",
    ["tier"],
    buckets=(0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
)
CONTEXT_EVICTIONS = Counter(
    "foundry_teacher_context_evictions",
    "Documents whose KV made room in a tier; lower ones may have it.",
    ["tier"],
)
CONTEXT_FILE_ERRORS = Counter(
    "foundry_teacher_context_file_errors",
    "Files of KV that could not be written, or were not what was written when they were read: write or read.",
    ["operation"],
)
PENDING = Gauge("foundry_teacher_pending_requests", "Calls that wait for the device or use it.")
MAX_PENDING = Gauge("foundry_teacher_max_pending_requests", "Most such calls; more are refused.")

for _result in ("hit", "miss", "absent"):
    CONTEXT_REQUESTS.labels(_result)
for _tier in ("device", "host", "disk"):
    CONTEXTS.labels(_tier)
    CONTEXT_BYTES.labels(_tier)
    CONTEXT_BUDGET_BYTES.labels(_tier)
    CONTEXT_HITS.labels(_tier)
    CONTEXT_EVICTIONS.labels(_tier)
for _tier in ("host", "disk"):
    CONTEXT_RELOAD_SECONDS.labels(_tier)
for _operation in ("read", "write"):
    CONTEXT_FILE_ERRORS.labels(_operation)
