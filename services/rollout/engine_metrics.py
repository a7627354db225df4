"""vLLM's metrics, by its own names, labels and buckets, wherever the meaning is the same: its dashboards work here.

https://docs.vllm.ai/en/latest/usage/metrics.html, as vLLM's V1 engine has them. One sequence is one request here, as
each of a request's `n` samples is in vLLM. The built-in engine preempts nothing, so that is not reported here; where
vLLM decodes, what else it counts is served beside these (`services/rollout/engine/vllm/metrics.py`).
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_LABELS = ("model_name", "engine")
# vLLM has one engine per data-parallel rank; we have one.
_ENGINE = "0"
_REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
# vLLM's end at the model's context; these are the same and go on.
_REQUEST_TOKENS = (*(mantissa * 10**exponent for exponent in range(6) for mantissa in (1, 2, 5)), 10**6)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

NUM_REQUESTS_RUNNING = Gauge("vllm:num_requests_running", "Sequences in the batch.", _LABELS)
NUM_REQUESTS_WAITING = Gauge(
    "vllm:num_requests_waiting", "Sequences that wait for their turn, in the queue or for a slot.", _LABELS
)
KV_CACHE_USAGE = Gauge("vllm:kv_cache_usage_perc", "Share of the KV memory in use, 0 to 1.", _LABELS)
PREFIX_CACHE_QUERIES = Counter(
    "vllm:prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache.", _LABELS
)
PREFIX_CACHE_HITS = Counter("vllm:prefix_cache_hits", "Prompt tokens whose KV was reused.", _LABELS)
PROMPT_TOKENS = Counter("vllm:prompt_tokens", "Tokens of prompts whose first token was sampled.", _LABELS)
GENERATION_TOKENS = Counter("vllm:generation_tokens", "Tokens sampled.", _LABELS)
REQUEST_SUCCESS = Counter(
    "vllm:request_success",
    "Sequences that ended: stop, length, or abort where the caller went away.",
    (*_LABELS, "finished_reason"),
)
TIME_TO_FIRST_TOKEN = Histogram(
    "vllm:time_to_first_token_seconds",
    "From the call's arrival, its cartridges' transfer included, to the first token of each sequence.",
    _LABELS,
    buckets=_FIRST_TOKEN_SECONDS,
)
INTER_TOKEN_LATENCY = Histogram(
    "vllm:inter_token_latency_seconds", "From one token of a sequence to the next.", _LABELS, buckets=_TOKEN_SECONDS
)
E2E_REQUEST_LATENCY = Histogram(
    "vllm:e2e_request_latency_seconds",
    "From the call's arrival to the last token of each sequence.",
    _LABELS,
    buckets=_REQUEST_SECONDS,
)
REQUEST_QUEUE_TIME = Histogram(
    "vllm:request_queue_time_seconds",
    "How long a sequence waited for its turn and its slot, from when its cartridges were there.",
    _LABELS,
    buckets=_REQUEST_SECONDS,
)
REQUEST_PREFILL_TIME = Histogram(
    "vllm:request_prefill_time_seconds", "From its slot to its first token.", _LABELS, buckets=_REQUEST_SECONDS
)
REQUEST_DECODE_TIME = Histogram(
    "vllm:request_decode_time_seconds", "From its first token to its last.", _LABELS, buckets=_REQUEST_SECONDS
)
REQUEST_PROMPT_TOKENS = Histogram(
    "vllm:request_prompt_tokens", "Prompt tokens of each sequence that ended.", _LABELS, buckets=_REQUEST_TOKENS
)
REQUEST_GENERATION_TOKENS = Histogram(
    "vllm:request_generation_tokens", "Tokens sampled for each sequence that ended.", _LABELS, buckets=_REQUEST_TOKENS
)
ITERATION_TOKENS = Histogram(
    "vllm:iteration_tokens_total",
    "Tokens sampled in one step, and of prompts that were through with it.",
    _LABELS,
    buckets=_STEP_TOKENS,
)


class EngineMetrics:
    """What the engine of one model does, its labels bound once and not at every token."""

    def __init__(self, model_name: str) -> None:
        labels = (model_name, _ENGINE)
        self.num_requests_running = NUM_REQUESTS_RUNNING.labels(*labels)
        self.num_requests_waiting = NUM_REQUESTS_WAITING.labels(*labels)
        self.kv_cache_usage = KV_CACHE_USAGE.labels(*labels)
        self.prefix_cache_queries = PREFIX_CACHE_QUERIES.labels(*labels)
        self.prefix_cache_hits = PREFIX_CACHE_HITS.labels(*labels)
        self.prompt_tokens = PROMPT_TOKENS.labels(*labels)
        self.generation_tokens = GENERATION_TOKENS.labels(*labels)
        self.request_success = {
            reason: REQUEST_SUCCESS.labels(*labels, reason) for reason in ("stop", "length", "abort", "error")
        }
        self.time_to_first_token = TIME_TO_FIRST_TOKEN.labels(*labels)
        self.inter_token_latency = INTER_TOKEN_LATENCY.labels(*labels)
        self.e2e_request_latency = E2E_REQUEST_LATENCY.labels(*labels)
        self.request_queue_time = REQUEST_QUEUE_TIME.labels(*labels)
        self.request_prefill_time = REQUEST_PREFILL_TIME.labels(*labels)
        self.request_decode_time = REQUEST_DECODE_TIME.labels(*labels)
        self.request_prompt_tokens = REQUEST_PROMPT_TOKENS.labels(*labels)
        self.request_generation_tokens = REQUEST_GENERATION_TOKENS.labels(*labels)
        self.iteration_tokens = ITERATION_TOKENS.labels(*labels)
