"""Records with a checksum: what was written comes back, and nothing else does."""

from __future__ import annotations

import json
import math

import pytest

from foundry.errors import InvalidArgument
from foundry.store.sealed import seal, unseal

VALUES = {"name": "Zürich", "count": 3, "share": 0.1, "none": None, "list": [1, "a"], "map": {"b": 1, "a": 2}}


def test_values_come_back() -> None:
    assert unseal(seal(VALUES)) == VALUES
    assert unseal(seal({}).encode()) == {}


def test_no_flipped_bit_passes() -> None:
    content = bytearray(seal(VALUES).encode())
    for bit in range(8 * len(content)):
        content[bit // 8] ^= 1 << bit % 8
        with pytest.raises(InvalidArgument):
            unseal(bytes(content))
        content[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", b"\xff", json.dumps(VALUES), '{"checksum": "NaN"}'])
def test_what_was_never_sealed_is_refused(text: str | bytes) -> None:
    with pytest.raises(InvalidArgument):
        unseal(text)


def test_what_json_cannot_say_is_not_sealed() -> None:
    with pytest.raises(InvalidArgument, match="no word"):
        seal({"loss": math.nan})
