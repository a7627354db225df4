"""What of a service can be seen from outside, as its settings say."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

LogFormat = Literal["json", "console"]


class TelemetrySettings(BaseModel):
    """Metrics, logs and traces of one service."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    metrics_port: int = 0
    """Port of /metrics; 0 serves none."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe level that is logged."""

    log_format: LogFormat = "json"
    """One JSON object a line, or lines for people at a terminal: console."""

    otlp_endpoint: str | None = None
    """OpenTelemetry collector that gets the traces, by OTLP over gRPC: `http://HOST:4317` or, with TLS, `https://…`.
    Unset: no traces. Needs the extra `telemetry`."""

    trace_sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of the traces that begin in this service (training steps, requests without a trace) which are sent."""
