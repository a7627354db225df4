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
CONTEXTS = Gauge("foundry_teacher_resident_contexts", "Documents whose KV is in memory.")
CONTEXT_BYTES = Gauge("foundry_teacher_context_bytes", "Memory that the documents' KV takes.")
CONTEXT_BUDGET_BYTES = Gauge("foundry_teacher_context_budget_bytes", "Most memory that the documents' KV may take.")
CONTEXT_REQUESTS = Counter(
    "foundry_teacher_context_requests",
    "Documents that were put, by whether their KV was there: hit or miss; and scores refused for want of it: absent.",
    ["result"],
)
CONTEXT_EVICTIONS = Counter("foundry_teacher_context_evictions", "Documents whose KV was dropped for another's.")
PENDING = Gauge("foundry_teacher_pending_requests", "Calls that wait for the device or use it.")
MAX_PENDING = Gauge("foundry_teacher_max_pending_requests", "Most such calls; more are refused.")

for _result in ("hit", "miss", "absent"):
    CONTEXT_REQUESTS.labels(_result)
