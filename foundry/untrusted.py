"""JSON that may be damaged or somebody else's: a value that every reader can take, or a typed error."""

from __future__ import annotations

import json
from typing import Any

from foundry.errors import InvalidArgument

# Of one stored record.
MAX_RECORD_BYTES = 16 * 2**20
# Python, pydantic and Lua give up at depths of their own, each in its own way; this is far above them all.
_MAX_DEPTH = 64
# Of an integer of 64 bits.
_MAX_DIGITS = 20


def parse_json(text: str | bytes, *, max_bytes: int = MAX_RECORD_BYTES) -> Any:
    """Raises InvalidArgument for what is not JSON (RFC 8259: no NaN), is larger than `max_bytes`, is nested more than
    64 deep, or holds an integer of more than 20 digits, a float beyond the range of floats or half a surrogate pair."""
    if len(text) > max_bytes:
        raise InvalidArgument(f"it has {len(text)} bytes, at most {max_bytes} are read")
    try:
        value = json.loads(text, parse_int=_integer)
        check_depth(value)
        write_json(value).encode()
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise InvalidArgument(f"it is not JSON ({error})") from error
    return value


def parse_object(text: str | bytes, *, max_bytes: int = MAX_RECORD_BYTES) -> dict[str, Any]:
    """As `parse_json`, and refuses what is no JSON object."""
    value = parse_json(text, max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise InvalidArgument("it is not a JSON object")
    return value


def check_depth(value: Any) -> None:
    """Raises InvalidArgument for JSON that is nested more than 64 deep."""
    # Lists and objects alone: what else there is may be very many numbers.
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MAX_DEPTH):
        if not level:
            return
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
    if level:
        raise _too_deep()


def write_json(value: Any) -> str:
    """Sorted keys, no NaN: always the same for the same value. Raises ValueError."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def parse_count(text: str) -> int:
    """A count as we write it: digits, and as few as Lua's numbers take. Raises InvalidArgument."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 16):
        raise InvalidArgument(f"{text[:100]!r} is not a number of at most 16 digits")
    return int(text)


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _too_deep() -> InvalidArgument:
    return InvalidArgument(f"it is nested more than {_MAX_DEPTH} deep")
