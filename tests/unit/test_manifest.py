"""Manifests survive JSON exactly, and nothing else passes for one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from foundry.errors import InvalidArgument
from foundry.store import Manifest
from foundry.store.sealed import seal, unseal
from tests.store_data import DOCUMENT, cartridge, draft


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
    return unseal(manifest().to_json(), "manifest")


def test_json_round_trip() -> None:
    assert Manifest.from_json(manifest().to_json()) == manifest()


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
        ("header", {}),
        ("header", None),
        ("name", "Bad Name"),
        ("run", "two words"),
    ],
)
def test_wrong_values_are_refused(key: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^(?!.*damaged)"):
        Manifest.from_json(seal(written() | {key: value}))


@pytest.mark.parametrize("key", sorted(written()))
def test_missing_keys_are_refused(key: str) -> None:
    values = written()
    del values[key]
    with pytest.raises(InvalidArgument, match=r"^(?!.*damaged)"):
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
    with pytest.raises(InvalidArgument, match="damaged"):
        Manifest.from_json(json.dumps(written()))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\x00"])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        Manifest.from_json(text)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_metrics_that_json_cannot_say_are_refused_before_publishing(value: float) -> None:
    with pytest.raises(InvalidArgument) as caught:
        draft(metrics={"kl": value})
    assert caught.value.field == "metrics"
