"""Logs, metrics and traces, the same in every service."""

from __future__ import annotations

from foundry.telemetry.logs import configure_logs
from foundry.telemetry.metrics import serve_metrics
from foundry.telemetry.settings import TelemetrySettings
from foundry.telemetry.traces import configure_traces

__all__ = ["configure_logs", "start"]


def start(service: str, settings: TelemetrySettings) -> None:
    """To be called first of all, so that a service can be watched while it starts. Raises PortTaken, ExtraMissing."""
    configure_logs(service, settings.log_level, settings.log_format)
    configure_traces(service, settings.otlp_endpoint, settings.trace_sample_ratio)
    serve_metrics(service, settings.metrics_port)
