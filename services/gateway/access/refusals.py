"""Refusals for a limit's sake, counted by limit."""

from __future__ import annotations

from foundry.errors import ResourceExhausted
from services.gateway import metrics


def exhausted(limit: str, message: str, *, retry_after_seconds: float | None = None) -> ResourceExhausted:
    """`limit` is a field of KeyLimits. Without `retry_after_seconds` nobody knows when it would be taken."""
    metrics.LIMITED.labels(limit).inc()
    return ResourceExhausted(message, retry_after_seconds=retry_after_seconds)
