"""What the gateway counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from foundry.store.api_keys import KeyLimits

REQUESTS = Counter("foundry_gateway_requests_total", "HTTP requests answered.", ["method", "route", "status"])
REQUEST_SECONDS = Histogram(
    "foundry_gateway_request_seconds",
    "Time to answer an HTTP request, streams until their end.",
    ["route"],
    buckets=(0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
ERRORS = Counter(
    "foundry_gateway_errors_total", "Requests that ended with an error, by its type (`foundry.errors`).", ["reason"]
)
LIMITED = Counter(
    "foundry_gateway_limited_requests_total", "Requests refused for a limit's sake, by limit (`limits`).", ["limit"]
)
CONNECTIONS = Gauge("foundry_gateway_connections", "Open connections of clients.")
REFUSED_CONNECTIONS = Counter(
    "foundry_gateway_refused_connections_total",
    "Connections that were closed: at most max_connections are kept (`full`), or the request took too long (`slow`).",
    ["reason"],
)
AUDIT_LINES_LOST = Counter(
    "foundry_gateway_audit_lines_lost_total",
    "Lines of the audit log that audit_log_file did not take: they are in the gateway's log alone.",
)
IN_FLIGHT = Gauge("foundry_gateway_completions_in_flight", "Completion requests being answered.")
MAX_IN_FLIGHT = Gauge("foundry_gateway_max_completions_in_flight", "Most of them; more are refused with 429.")
FIRST_TOKEN_SECONDS = Histogram(
    "foundry_gateway_time_to_first_token_seconds",
    "From the request to its first token.",
    buckets=(0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 100),
)
PROMPT_TOKENS = Counter("foundry_gateway_prompt_tokens_total", "Prompt tokens of completed answers.")
CACHED_TOKENS = Counter("foundry_gateway_cached_tokens_total", "Prompt tokens whose KV was reused.")
GENERATION_TOKENS = Counter("foundry_gateway_generation_tokens_total", "Tokens of completed answers.")
ROLLOUT_RETRIES = Counter("foundry_gateway_rollout_retries_total", "Attempts repeated on Unavailable.")
IDENTITY_MISMATCHES = Counter(
    "foundry_gateway_identity_mismatches_total", "Answers withheld because they came from other cartridges than asked."
)
ROLLOUTS_REACHABLE = Gauge("foundry_gateway_rollouts_reachable", "Rollout servers that answered the last look.")
JOBS = Counter(
    "foundry_gateway_jobs_total",
    "What came of looks at Jobs: created, existed, deleted, failed (a run ended by its Job's failure), refused, error.",
    ["outcome"],
)

for _outcome in ("created", "existed", "deleted", "failed", "refused", "error"):
    JOBS.labels(_outcome)
for _limit in KeyLimits.model_fields:
    LIMITED.labels(_limit)
for _reason in ("full", "slow"):
    REFUSED_CONNECTIONS.labels(_reason)
for _reason in ("INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE"):
    ERRORS.labels(_reason)
