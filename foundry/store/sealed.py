"""Small JSON records with a checksum over the rest: a bit that flips at rest is found out, and nothing is believed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foundry.errors import InvalidArgument
from foundry.identity import content_digest
from foundry.untrusted import MAX_RECORD_BYTES, parse_object, write_json


def seal(values: Mapping[str, Any]) -> str:
    """`values` as JSON, with a `checksum`. Raises InvalidArgument for what could not be read again."""
    text = _dump({**values, "checksum": _checksum(values)})
    if len(text.encode()) > MAX_RECORD_BYTES:
        raise InvalidArgument(f"a record can't have more than {MAX_RECORD_BYTES} bytes")
    return text


def unseal(text: str | bytes) -> dict[str, Any]:
    """The values of a record. Raises InvalidArgument unless it is as `seal` wrote it."""
    values = parse_object(text)
    stated = values.pop("checksum", None)
    if stated != (found := _checksum(values)):
        raise InvalidArgument(f"its checksum is {found}, it says {str(stated)[:100]}")
    return values


def _checksum(values: Mapping[str, Any]) -> str:
    return content_digest(_dump(values).encode())


def _dump(values: Mapping[str, Any]) -> str:
    try:
        return write_json(values)
    except ValueError as error:
        raise InvalidArgument(f"a record can't hold what JSON has no word for: {error}") from error
