"""Manifests survive JSON exactly, and nothing else passes for one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from foundry.errors import InvalidArgument
from foundry.store import Manifest
from foundry.store.sealed import seal, unseal
from tests.store_data import DOCUMENT, cartridge, draft

# As it is in stores.
WRITTEN = (
    '{"attempt": 1, "checksum": "blake3:6be30f3afbb4b5eb0d1d25e037f21f689b669877903956a348833a645067995c", '
    '"created_at": "2026-11-22T10:00:00.000+00:00", '
    '"digest": "blake3:0404040404040404040404040404040404040404040404040404040404040404", '
    '"document": "blake3:cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd", '
    '"header": {"dtype": "float32", "format": "foundry-cartridge/1", "head_dim": 8, '
    '"model_fingerprint": "blake3:abababababababababababababababababababababababababababababababab", '
    '"num_frozen": 1, "num_kv_heads": 1, "num_layers": 1, "num_tokens": 16, "position_offset": 0, '
    '"rope": {"factors": [1, 2.5], "theta": 10000.0, "type": "default"}}, "init": "", '
    '"metrics": {"kl": 0.25, "steps": 3, "é": 1e-05}, "name": "acme/report", "objective": "", '
    '"parent": "blake3:0303030303030303030303030303030303030303030303030303030303030303", "run": "run-a", '
    '"step": 3, "tokens_seen": 12, "version": 17}'
)


def manifest() -> Manifest:
    stored = cartridge(1)
    return Manifest.of(
        draft("acme/report", step=3, document=DOCUMENT, parent=stored.digest(), tokens_seen=12, metrics={"kl": 0.25}),
        header=stored.header,
        digest=stored.digest(),
        version=17,
        created_at="2026-11-22T10:00:00.000+00:00",
    )


def written() -> dict[str, Any]:
    return unseal(manifest().to_json())


def test_json_round_trip() -> None:
    assert Manifest.from_json(manifest().to_json()) == manifest()


def test_what_was_written_before_is_read_and_written_byte_for_byte() -> None:
    read = Manifest.from_json(WRITTEN)
    assert read.to_json() == WRITTEN
    assert (read.header.num_tokens, read.metrics["steps"], read.version) == (16, 3, 17)


def test_id_names_version_and_digest() -> None:
    assert (manifest().id.name, manifest().id.version, manifest().id.digest) == (
        "acme/report",
        17,
        cartridge(1).digest(),
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("surprise", 1),
        ("version", 0),
        ("version", "17"),
        ("version", True),
        ("step", 1.0),
        ("digest", "blake3:12"),
        ("digest", None),
        ("parent", 5),
        ("metrics", []),
        ("metrics", {"kl": "low"}),
        ("metrics", {"kl": 10**400}),
        ("attempt", -1),
        ("tokens_seen", None),
        ("parent", "blake3:12"),
        ("version", 2**53),
        ("header", {}),
        ("header", None),
        ("name", "Bad Name"),
        ("run", "two words"),
    ],
)
def test_wrong_values_are_refused(key: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^(?!.*checksum)"):
        Manifest.from_json(seal(written() | {key: value}))


@pytest.mark.parametrize("key", sorted(written()))
def test_missing_keys_are_refused(key: str) -> None:
    values = written()
    del values[key]
    with pytest.raises(InvalidArgument, match=r"^(?!.*checksum)"):
        Manifest.from_json(seal(values))


def test_no_flipped_bit_passes() -> None:
    content = bytearray(manifest().to_json().encode())
    for bit in range(8 * len(content)):
        content[bit // 8] ^= 1 << bit % 8
        with pytest.raises(InvalidArgument):
            Manifest.from_json(bytes(content))
        content[bit // 8] ^= 1 << bit % 8
    assert Manifest.from_json(bytes(content)) == manifest()


def test_without_its_checksum_it_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="checksum"):
        Manifest.from_json(json.dumps(written()))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\x00"])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        Manifest.from_json(text)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_metrics_that_json_cannot_say_are_refused_before_publishing(value: float) -> None:
    with pytest.raises(InvalidArgument) as caught:
        draft(metrics={"kl": value})
    assert caught.value.field == "metrics.kl"
