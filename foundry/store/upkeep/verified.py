"""What a check of the store says of one thing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from foundry.errors import DigestMismatch, NotFound

Kind = Literal[
    "manifest", "blob", "hot", "tag", "pointer", "document", "dataset", "api_key", "grant", "run", "checkpoint", "mark"
]


@dataclass(frozen=True, slots=True)
class Verified:
    """One thing that was looked at. `num_bytes` were hashed; `why` says what is wrong, and '' if nothing is.

    missing: something names it, and it is not there. corrupt: it is not what its name says. orphaned: nothing names
    it; `foundry gc` removes it.
    """

    state: Literal["ok", "missing", "corrupt", "orphaned"]
    kind: Kind
    key: str
    num_bytes: int
    why: str


async def looked_at(
    kind: Kind, key: str, check: Awaitable[int], still: Callable[[], Awaitable[bool]]
) -> AsyncIterator[Verified]:
    """What `check` finds, which returns the bytes that it hashed. Nothing if it raises NotFound and what was to be
    looked at is not there `still`."""
    try:
        yield Verified("ok", kind, key, await check, "")
    except DigestMismatch as error:
        yield Verified("corrupt", kind, key, 0, error.message)
    except NotFound as error:
        if await still():
            yield Verified("missing", kind, key, 0, error.message)
