"""What travels with a call besides its message: the trace it belongs to, and the run that it is made for.

Both go into the log lines of whoever answers. A server handles each call in a task of its own, whose context ends with
it: what is bound here is never taken back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from grpc.aio import Metadata
from opentelemetry import context, trace

from foundry.telemetry import traces

_RUN = "foundry-run"
_RUN_VALUE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_tracer = trace.get_tracer(__name__)


def outgoing(metadata: Metadata | None) -> Metadata | None:
    """A call's metadata, with the current span and the run of the log context."""
    carrier: dict[str, str] = {}
    traces.inject(carrier)
    if run := structlog.contextvars.get_contextvars().get("run"):
        carrier[_RUN] = run
    return Metadata(*(metadata or ()), *carrier.items()) if carrier else metadata


@contextmanager
def entered(method: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> Iterator[None]:
    """Take up the caller's context for the rest of the task; within, a span of the call is open.

    Calls outside of any trace, such as regular looks at a server, begin none.
    """
    carrier = {key: value for key, value in metadata or () if isinstance(value, str)}
    if _RUN_VALUE.fullmatch(run := carrier.get(_RUN, "")):
        structlog.contextvars.bind_contextvars(run=run)
    parent = traces.extract(carrier)
    if not trace.get_current_span(parent).get_span_context().is_valid:
        yield
        return
    span = _tracer.start_span(method, parent, kind=trace.SpanKind.SERVER)
    context.attach(trace.set_span_in_context(span, parent))
    try:
        yield
    except Exception as error:
        span.record_exception(error)
        span.set_status(trace.StatusCode.ERROR, str(error))
        raise
    finally:
        span.end()


def bind_request(request: Any) -> None:
    """Bind to the log context what a message names: the request and its first cartridge; of a batch, the first's."""
    first = next(iter(getattr(request, "requests", ())), request)
    cartridge = next(iter(getattr(first, "cartridges", ())), None)
    named = {
        "request_id": getattr(first, "request_id", ""),
        "version": getattr(cartridge, "version", 0),
        "digest": getattr(cartridge, "digest", ""),
    }
    structlog.contextvars.bind_contextvars(**{key: value for key, value in named.items() if value})
