"""What is stored may be damaged or not ours: who asks for it is told, and who goes through everything goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from foundry.errors import DigestMismatch, InvalidArgument
from foundry.store import metrics
from foundry.store.names import LATEST, Reference

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


def damaged_version(reference: Reference, version: int) -> DigestMismatch:
    """For who asks what a reference means, where passing over a damaged version would give another one."""
    name, selector = reference.name, reference.selector
    if isinstance(selector, int) or selector == LATEST:
        decide = f"give it up with 'foundry cartridges rm {name}@{version}'"
    else:
        decide = f"move the tag with 'foundry cartridges tag {name}@VERSION {selector}'"
    return DigestMismatch(
        f"{reference} means version {version}, which is damaged: 'foundry store verify' says how. Restore it from a "
        f"backup and run 'foundry store rebuild --force', or {decide}. Other versions are served by number and digest"
    )


@contextmanager
def skipped(kind: str, key: str) -> Iterator[None]:
    """Goes on after a DigestMismatch of one among many: logged and counted, and `foundry store verify` lists it."""
    try:
        yield
    except DigestMismatch as error:
        metrics.UNREADABLE.labels(kind).inc()
        log.error("record_unreadable", kind=kind, key=key, error=error.message)
