"""Logs: every line on standard error is one JSON object, whoever wrote it."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Sequence
from types import TracebackType

import structlog
from opentelemetry import trace
from structlog.typing import EventDict, Processor, WrappedLogger

from foundry.errors import FoundryError
from foundry.telemetry.log_limit import LogLimit
from foundry.telemetry.settings import LogFormat

log = structlog.get_logger(__name__)


def configure_logs(service: str, level: str, log_format: LogFormat = "json") -> None:
    """Log to standard error: our own lines, libraries', warnings and what no one caught, each with the service's name.

    `console` is for people at a terminal.
    """

    def add_service(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event["service"] = service
        return event

    first: Sequence[Processor] = (
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_service,
        _add_trace,
    )
    structlog.configure(
        processors=[*first, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*first, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_last(log_format)],
        )
    )
    handler.addFilter(LogLimit())
    logging.root.handlers = [handler]
    logging.root.setLevel(level.upper())
    _take_over_libraries()
    sys.excepthook = _uncaught
    threading.excepthook = lambda failed: _uncaught(failed.exc_type, failed.exc_value, failed.exc_traceback)


def _last(log_format: LogFormat) -> Sequence[Processor]:
    if log_format == "console":
        return (structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),)
    return (structlog.processors.format_exc_info, structlog.processors.JSONRenderer())


def _add_trace(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
        event["span_id"] = trace.format_span_id(context.span_id)
    return event


def _take_over_libraries() -> None:
    """What a library prints by handlers of its own comes to ours."""
    logging.captureWarnings(True)
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger) and logger.handlers:
            logger.handlers.clear()
            logger.propagate = True
    # gRPC's core writes lines of its own; what it has to say also comes as the status of a call.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()


def _uncaught(kind: type[BaseException], error: BaseException | None, at: TracebackType | None) -> None:
    if isinstance(error, FoundryError):
        # It says what is wrong and what to do; where in our code is no help.
        log.critical("stopped", reason=error.reason, error=error.message)
    elif error is None or issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error or kind(), at)
    else:
        log.critical("uncaught", exc_info=(kind, error, at))
