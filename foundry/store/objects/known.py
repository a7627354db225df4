"""Small records that a process keeps in memory: those alone that changed are read again."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from foundry.store.objects.objects import ETag, Objects

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Known(Generic[T]):
    """A record as it was when it had that ETag; `value` is None if it could not be read."""

    etag: ETag
    value: T | None


async def refreshed(
    objects: Objects,
    kind: str,
    directory: str,
    ours: re.Pattern[str],
    parse: Callable[[str, bytes], T],
    known: Mapping[str, Known[T]],
) -> dict[str, Known[T]]:
    """All records in `directory` whose keys match `ours`, by key. Read are only those that changed since `known`; a
    damaged one is logged and counted once, as `kind`."""
    entries = {entry.key: entry.etag async for entry in objects.scan(directory) if ours.fullmatch(entry.key)}
    same = {key: known[key] for key, etag in entries.items() if key in known and known[key].etag == etag}
    changed = [key for key in entries if key not in same]
    read = await objects.records(kind, changed, parse)
    return same | {key: Known(entries[key], read.get(key)) for key in changed}
