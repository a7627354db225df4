"""Traces: spans go to an OpenTelemetry collector, if one is configured; else every span is a no-op of the API."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence

from opentelemetry import context, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from foundry import extras

_PROPAGATOR = TraceContextTextMapPropagator()
_TRACEPARENT = "traceparent"
# A collector that is away must not hold up a service that stops.
_EXPORT_SECONDS = 5
_started: list[Callable[[], None]] = []


def configure_traces(service: str, endpoint: str | None, sample_ratio: float) -> None:
    """Send spans to the collector at `endpoint` (OTLP over gRPC), of that share of the traces that begin here.

    What belongs to a caller's trace follows the caller. Without an endpoint nothing happens. Raises ExtraMissing.
    """
    if not endpoint:
        return
    extras.require("telemetry", extras.TELEMETRY)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(sample_ratio),
        resource=Resource.create({"service.name": service, "service.namespace": "cartridge-foundry"}),
    )
    exporter = OTLPSpanExporter(endpoint, insecure=not endpoint.startswith("https://"), timeout=_EXPORT_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    _started.append(provider.shutdown)


def flush_traces() -> None:
    """Send what has not been sent, and end. Needed only where the process ends without Python's own exit."""
    while _started:
        _started.pop()()


def inject(carrier: MutableMapping[str, str]) -> None:
    """Add the current span to what goes to another process; nothing if there is none."""
    _PROPAGATOR.inject(carrier)


def extract(carrier: Mapping[str, str]) -> context.Context:
    """What another process injected; as a new trace if it did not, or not readably."""
    return _PROPAGATOR.extract(carrier, context.Context())


def current_traceparent() -> str:
    """The current span, to be linked to later; "" if there is none."""
    carrier: dict[str, str] = {}
    inject(carrier)
    return carrier.get(_TRACEPARENT, "")


def context_of(traceparent: str) -> context.Context:
    """The context of the span that `current_traceparent` named; "" is no span."""
    return extract({_TRACEPARENT: traceparent})


def links_to(traceparent: str) -> Sequence[trace.Link]:
    """A link to the span that `current_traceparent` named; none for ""."""
    span = trace.get_current_span(context_of(traceparent)).get_span_context()
    return [trace.Link(span)] if span.is_valid else []
