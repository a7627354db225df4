"""Grants in the store: who may query whose cartridge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from foundry.errors import Conflict, DigestMismatch, GrantNotFound, InvalidArgument
from foundry.store import CartridgeStore, GrantStore, Objects
from foundry.store.objects import layout
from foundry.store.sealed import seal, unseal
from tests.store_data import cartridge, draft


@pytest.fixture
def grants(tmp_path: Path) -> GrantStore:
    return GrantStore(Objects.open(f"file://{tmp_path}", retry_seconds=1))


async def test_grants_are_put_listed_and_deleted(grants: GrantStore) -> None:
    first = await grants.put("acme/handbook", "globex")
    assert await grants.put("acme/handbook", "globex") == first
    second = await grants.put("acme/handbook", "initech")
    other = await grants.put("acme/handbook-2", "globex")
    assert await grants.of_name("acme/handbook") == [first, second]
    assert await grants.for_tenant("globex") == [other, first]
    page = await grants.page("acme/handbook", limit=1)
    assert (page.items, page.next_after) == ([first], "globex")
    assert (await grants.page("acme/handbook", after="globex", limit=1)).items == [second]
    await grants.delete("acme/handbook", "globex")
    assert await grants.of_name("acme/handbook") == [second]
    with pytest.raises(GrantNotFound, match="acme/handbook is not granted to globex"):
        await grants.delete("acme/handbook", "globex")


@pytest.mark.parametrize(
    ("name", "tenant"),
    [
        # Within any other tenant it would mean a cartridge of its own.
        ("handbook", "globex"),
        ("acme/handbook", "acme"),
        ("acme/handbook", ""),
        ("acme/handbook", "Globex"),
        ("acme/handbook", "../x"),
        ("acme/handbook", "a/b"),
        ("../x/y", "globex"),
    ],
)
async def test_what_can_be_no_grant_is_refused(grants: GrantStore, name: str, tenant: str) -> None:
    with pytest.raises(InvalidArgument):
        await grants.put(name, tenant)
    assert await grants._objects.keys(layout.GRANTS) == []


DAMAGES: dict[str, Callable[[str], str]] = {
    "torn": lambda text: text[1:],
    "another tenant's": lambda text: seal(unseal(text) | {"tenant": "initech"}),
    "another name's": lambda text: seal(unseal(text) | {"name": "acme/secret"}),
    "a changed letter": lambda text: text.replace("T", "t"),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_grant_grants_nothing_and_can_be_put_again(
    grants: GrantStore, tmp_path: Path, damage: str
) -> None:
    whole, torn = [await grants.put("acme/handbook", tenant) for tenant in ("globex", "hooli")]
    record = tmp_path / layout.grant("acme/handbook", "hooli")
    record.write_text(DAMAGES[damage](record.read_text()))
    assert await grants.of_name("acme/handbook") == [whole]
    assert await grants.for_tenant("hooli") == await grants.for_tenant("initech") == []
    assert [known.value for known in (await grants.refreshed({})).values() if known.value] == [whole]
    with pytest.raises(DigestMismatch, match="grants/acme/handbook/hooli"):
        await grants.get("acme/handbook", "hooli")
    assert (await grants.put("acme/handbook", "hooli")).tenant == torn.tenant
    assert len(await grants.of_name("acme/handbook")) == 2
    record.write_text("")
    await grants.delete("acme/handbook", "hooli")
    assert await grants.of_name("acme/handbook") == [whole]


async def test_a_name_goes_with_its_grants(store: CartridgeStore) -> None:
    for name in ("acme/handbook", "acme/handbook-2"):
        await store.acquire(name, "run-a", 1)
        await store.publish(cartridge(1), draft(name), durable=True)
        await store.grants.put(name, "globex")
    with pytest.raises(Conflict):
        await store.delete("acme/handbook")
    assert len(await store.grants.for_tenant("globex")) == 2
    await store.release("acme/handbook", "run-a", 1)
    await store.delete("acme/handbook")
    assert [grant.name for grant in await store.grants.for_tenant("globex")] == ["acme/handbook-2"]


async def test_damaged_grants_are_found(store: CartridgeStore) -> None:
    async def found() -> dict[str, str]:
        return {each.key: each.state async for each in store.verify() if each.kind == "grant"}

    await store.grants.put("acme/handbook", "globex")
    record = layout.grant("acme/handbook", "globex")
    assert await found() == {record: "ok"}
    await store.objects.put(record, [b"{}"])
    assert await found() == {record: "corrupt"}
