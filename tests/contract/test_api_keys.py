"""API keys in the store: made, listed, revoked, and never believed when damaged."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from foundry.errors import ApiKeyNotFound, DigestMismatch, InvalidArgument
from foundry.store import KeyStore, Objects
from foundry.store.api_keys import KeyLimits
from foundry.store.key_store import KeyText
from foundry.store.objects import layout
from foundry.store.sealed import seal, unseal

NOW = datetime.now(UTC)


@pytest.fixture
def keys(tmp_path: Path) -> KeyStore:
    return KeyStore(Objects.open(f"file://{tmp_path}", retry_seconds=1))


async def test_a_key_is_shown_once_and_only_its_hash_is_kept(keys: KeyStore, tmp_path: Path) -> None:
    limits = KeyLimits(requests_per_minute=60)
    made, text = await keys.create(tenant="acme", label="of the wiki", scopes=("query", "train"), limits=limits)
    assert KeyText.parse(text) == KeyText(made.key_id, made.secret_digest)
    assert await keys.get(made.key_id) == made
    assert await keys.list() == [made]
    assert (made.tenant, made.scopes, made.limits, made.ended(NOW)) == ("acme", ("query", "train"), limits, "")
    record = (tmp_path / "api-keys" / f"{made.key_id}.json").read_text()
    assert text.rpartition(f"{made.key_id}_")[2] not in record


async def test_keys_are_listed_page_by_page(keys: KeyStore) -> None:
    made = sorted([(await keys.create(scopes=["query"]))[0].key_id for _ in range(3)])
    page = await keys.page(limit=2)
    assert ([key.key_id for key in page.items], page.next_after) == (made[:2], made[1])
    assert [key.key_id for key in (await keys.page(after=made[1], limit=2)).items] == made[2:]


async def test_a_key_ends_when_it_is_revoked_or_expires(keys: KeyStore) -> None:
    made, _ = await keys.create(scopes=["admin"], expires_at=NOW + timedelta(days=1))
    assert made.ended(NOW) == ""
    assert "expired" in made.ended(NOW + timedelta(days=1))
    await keys.revoke(made.key_id)
    revoked = await keys.get(made.key_id)
    assert "was revoked" in revoked.ended(NOW)
    await keys.revoke(made.key_id)
    assert await keys.get(made.key_id) == revoked


@pytest.mark.parametrize("key_id", ["aaaaaaaaaaaa", "", "../../escaped", "AAAAAAAAAAAA"])
async def test_an_unknown_key_cannot_be_revoked(keys: KeyStore, key_id: str) -> None:
    with pytest.raises(ApiKeyNotFound if key_id == "a" * 12 else InvalidArgument):
        await keys.revoke(key_id)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scopes": []},
        {"scopes": ["root"]},
        {"scopes": ["query", "query"]},
        {"scopes": ["query"], "tenant": "a/b"},
        {"scopes": ["query"], "tenant": "Acme"},
        {"scopes": ["query"], "label": "x" * 201},
    ],
)
async def test_an_impossible_key_is_not_made(keys: KeyStore, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        await keys.create(**wrong)
    assert await keys.list() == []


@pytest.mark.parametrize("text", ["", "fdy_", "fdy_aaaaaaaaaaaa_short", "sk-" + "a" * 60, f"fdy_{'a' * 12}_{'ä' * 43}"])
def test_what_is_no_key_is_refused_without_being_repeated(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        KeyText.parse(text)
    assert len(text) < 12 or text not in caught.value.message


async def test_only_what_changed_is_read_again(keys: KeyStore, tmp_path: Path) -> None:
    first, second = [(await keys.create(scopes=["query"]))[0] for _ in range(2)]
    known = await keys.refreshed({})
    records = {key: layout.api_key(key.key_id) for key in (first, second)}
    assert {record: each.value for record, each in known.items()} == {record: key for key, record in records.items()}
    await keys.revoke(first.key_id)
    again = await keys.refreshed(known)
    assert again[records[second]] is known[records[second]]
    assert again[records[first]].value == await keys.get(first.key_id)
    (tmp_path / "api-keys" / f"{second.key_id}.json").unlink()
    assert again.keys() - await keys.refreshed(again) == {records[second]}


@pytest.mark.parametrize("damage", ["bytes", "scope", "another's"])
async def test_a_damaged_key_is_passed_over_and_can_be_revoked(keys: KeyStore, tmp_path: Path, damage: str) -> None:
    whole, torn = [(await keys.create(scopes=["query"]))[0] for _ in range(2)]
    record = tmp_path / "api-keys" / f"{torn.key_id}.json"
    known = await keys.refreshed({})
    content = {
        "bytes": lambda: record.read_text()[1:],
        "scope": lambda: record.read_text().replace("query", "admin"),
        "another's": lambda: seal(unseal(record.read_text()) | {"key_id": whole.key_id}),
    }[damage]()
    record.write_text(content)
    assert await keys.list() == [whole]
    assert {record: each.value for record, each in (await keys.refreshed(known)).items()} == {
        layout.api_key(whole.key_id): whole,
        layout.api_key(torn.key_id): None,
    }
    with pytest.raises(DigestMismatch, match=f"api-keys/{torn.key_id}"):
        await keys.get(torn.key_id)
    await keys.revoke(torn.key_id)
    with pytest.raises(ApiKeyNotFound):
        await keys.get(torn.key_id)
