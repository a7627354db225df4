"""When what happened to one sequence, and what is reported of it. Times are `time.perf_counter()`."""

from __future__ import annotations

from services.rollout.engine import SequenceRequest, TokenOutput
from services.rollout.engine_metrics import EngineMetrics


class Timeline:
    """From the call's arrival to the sequence's last token."""

    __slots__ = (
        "_arrived_at",
        "_first_at",
        "_last_at",
        "_metrics",
        "_num_prompt_tokens",
        "_num_queried_tokens",
        "_scheduled_at",
        "_submitted_at",
        "num_tokens",
    )

    def __init__(
        self, metrics: EngineMetrics, request: SequenceRequest, *, arrived_at: float, submitted_at: float
    ) -> None:
        self._metrics = metrics
        self._num_prompt_tokens = len(request.prompt_ids)
        self._num_queried_tokens = 0 if request.skip_prefix_cache else len(request.prompt_ids)
        self._arrived_at, self._submitted_at = arrived_at, submitted_at
        self._scheduled_at = self._first_at = self._last_at = submitted_at
        self.num_tokens = 0

    def token(self, output: TokenOutput, now: float) -> int:
        """Take a token; returns how many prompt tokens are through with it: all with the first, then none."""
        self.num_tokens += 1
        since, self._last_at = self._last_at, now
        if self.num_tokens > 1:
            self._metrics.inter_token_latency.observe(now - since)
            return 0
        self._scheduled_at, self._first_at = output.scheduled_at, now
        self._metrics.time_to_first_token.observe(now - self._arrived_at)
        self._metrics.prefix_cache_queries.inc(self._num_queried_tokens)
        self._metrics.prefix_cache_hits.inc(output.cached_tokens)
        return self._num_prompt_tokens

    def end(self, finished_reason: str) -> None:
        """Report the whole. A sequence that was given up has no latency: it says nothing about the server."""
        self._metrics.request_success[finished_reason].inc()
        if finished_reason == "abort":
            return
        self._metrics.e2e_request_latency.observe(self._last_at - self._arrived_at)
        self._metrics.request_queue_time.observe(self._scheduled_at - self._submitted_at)
        self._metrics.request_prefill_time.observe(self._first_at - self._scheduled_at)
        self._metrics.request_decode_time.observe(self._last_at - self._first_at)
        self._metrics.request_prompt_tokens.observe(self._num_prompt_tokens)
        self._metrics.request_generation_tokens.observe(self.num_tokens)
