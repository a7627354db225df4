"""Chains of parents."""

from __future__ import annotations

from foundry.store import Manifest
from foundry.store.lineage import MAX_ANCESTORS, Ancestor, lineage
from tests.store_data import cartridge, draft


def version(number: int, content: int, parent: int | None) -> Manifest:
    stored = cartridge(content)
    return Manifest.of(
        draft(step=number, parent=None if parent is None else cartridge(parent).digest()),
        header=stored.header,
        digest=stored.digest(),
        version=number,
        created_at="2026-01-01T00:00:00.000+00:00",
    )


def test_a_chain_ends_with_the_first_version() -> None:
    versions = [version(1, 1, None), version(2, 2, 1), version(3, 3, 2)]
    assert lineage(versions[2], versions) == [Ancestor(2, cartridge(2).digest()), Ancestor(1, cartridge(1).digest())]
    assert lineage(versions[0], versions) == []


def test_a_parent_that_is_gone_is_known_by_its_digest_alone() -> None:
    versions = [version(1, 1, None), version(3, 3, 2)]
    assert lineage(versions[1], versions) == [Ancestor(None, cartridge(2).digest())]


def test_a_rollback_comes_from_what_was_latest_and_its_child_from_it() -> None:
    # Version 3 has the bytes of version 1 again; version 4 was trained from there.
    versions = [version(1, 1, None), version(2, 2, 1), version(3, 1, 2), version(4, 4, 1)]
    assert [ancestor.version for ancestor in lineage(versions[3], versions)] == [3, 2, 1]


def test_a_long_chain_is_cut() -> None:
    versions = [version(number, number, number - 1) for number in range(1, MAX_ANCESTORS + 10)]
    assert [each.version for each in lineage(versions[-1], versions)] == list(range(MAX_ANCESTORS + 8, 8, -1))
