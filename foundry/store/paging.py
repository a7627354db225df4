"""Long lists a page at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from foundry.errors import InvalidArgument

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """`next_after` is where the next one begins, None if there is none. What can't be read is left out of `items`."""

    items: list[T]
    next_after: str | None


def cut(keys: Sequence[str], after: str, limit: int) -> tuple[Sequence[str], str | None]:
    """At most `limit` keys behind `after` ("": from the first one), and where the next page begins.

    Raises InvalidArgument if `after` is none of them.
    """
    try:
        begin = keys.index(after) + 1 if after else 0
    except ValueError:
        raise InvalidArgument(
            f"{after[:100]!r} is not in the list, or not any more: begin it again", field="after"
        ) from None
    some = keys[begin : begin + limit]
    return some, some[-1] if begin + limit < len(keys) else None
