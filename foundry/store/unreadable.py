"""What is stored may be damaged or not ours: who asks for it is told, and who goes through everything goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from foundry.errors import DigestMismatch, InvalidArgument
from foundry.store import metrics

log = structlog.get_logger(__name__)

# What parsers raise: ours, and those of numbers, times, enums and mappings.
REFUSALS = (InvalidArgument, LookupError, OverflowError, ValueError)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Raises DigestMismatch, which names `what` is read, where its parser refuses it."""
    try:
        yield
    except REFUSALS as error:
        said = error.message if isinstance(error, InvalidArgument) else repr(error)
        raise DigestMismatch(f"{what} is damaged: {said}") from error


@contextmanager
def skipped(kind: str, key: str) -> Iterator[None]:
    """Goes on after a DigestMismatch of one among many: logged and counted, and `foundry store verify` lists it."""
    try:
        yield
    except DigestMismatch as error:
        metrics.UNREADABLE.labels(kind).inc()
        log.error("record_unreadable", kind=kind, key=key, error=error.message)
