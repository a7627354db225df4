"""Logs and metrics, the same in every service."""

from __future__ import annotations

import logging
import sys

import structlog
from prometheus_client import Histogram, start_http_server

_RPC_SECONDS = Histogram(
    "foundry_rpc_server_seconds",
    "Time to answer a gRPC call, streams until their end.",
    ["method", "code"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)


def configure_logs(service: str, level: str) -> None:
    """JSON lines on standard error, each with the service's name."""
    logging.basicConfig(stream=sys.stderr, level=level.upper(), format="%(message)s")
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)


def serve_metrics(port: int) -> None:
    """Serve /metrics on `port` from a thread; 0 turns it off."""
    if port:
        start_http_server(port)


def observe_rpc(method: str, code: str, seconds: float) -> None:
    _RPC_SECONDS.labels(method, code).observe(seconds)
