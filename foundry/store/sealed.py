"""Small JSON records with a checksum over the rest: a bit that flips at rest is found out, and nothing is believed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from foundry.errors import InvalidArgument
from foundry.identity import content_digest


def seal(values: Mapping[str, Any]) -> str:
    """`values` as JSON, with a `checksum`. No NaN: a reader in another language would refuse it."""
    return _dump({**values, "checksum": _checksum(values)})


def unseal(text: str | bytes, what: str) -> dict[str, Any]:
    """The values of a record; `what` names it in errors. Raises InvalidArgument unless it is as `seal` wrote it."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"{what} is damaged: it is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise InvalidArgument(f"{what} is damaged: it is not a JSON object")
    stated = values.pop("checksum", None)
    if stated != (found := _checksum(values)):
        raise InvalidArgument(f"{what} is damaged: its checksum is {found}, it says {stated}")
    return values


def _checksum(values: Mapping[str, Any]) -> str:
    return content_digest(_dump(values).encode())


def _dump(values: Mapping[str, Any]) -> str:
    try:
        return json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise InvalidArgument(f"a record can't hold what JSON has no word for: {error}") from error
