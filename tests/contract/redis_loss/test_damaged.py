"""Redis lost while the newest version is damaged: no pointer passes over it, and each way to decide works."""

from __future__ import annotations

import pytest

from foundry.errors import CartridgeNotFound, Conflict, DigestMismatch
from foundry.store import CartridgeStore, Manifest, StoreSettings
from tests.contract.redis_loss.versions import flush, publish
from tests.valkey import Valkey

MANIFEST = "cartridges/report/0000000004.json"


async def damage(store: CartridgeStore, what: str) -> tuple[str, bytes]:
    """Damage version 4 of `report`, which is `latest` then and `prod`; returns what heals it."""
    await store.tag("report", "prod", 4)
    key = (
        MANIFEST if what == "manifest" else f"blobs/blake3/{(await store.manifest('report', 4)).digest[7:]}.safetensors"
    )
    content = bytes(await store.objects.get(key))
    if what == "manifest":
        await store.objects.put(key, [content[:-9]])
    else:
        await store.objects.delete(key)
    await flush(store)
    return key, content


@pytest.fixture
async def whole(filled: CartridgeStore) -> Manifest:
    return await filled.manifest("report", 2)


@pytest.mark.parametrize("what", ["manifest", "blob"])
async def test_what_may_mean_a_damaged_version_is_refused(filled: CartridgeStore, whole: Manifest, what: str) -> None:
    await damage(filled, what)
    with pytest.raises(DigestMismatch, match=r"report@latest means version 4.*'foundry cartridges rm report@4'"):
        await filled.resolve("report")
    with pytest.raises(DigestMismatch, match=r"'foundry cartridges tag report@VERSION prod'"):
        await filled.resolve("report@prod")
    with pytest.raises(DigestMismatch, match=r"report@4"):
        await filled.resolve("report@4")
    for reference in ("report@2", f"report@{whole.digest}"):
        assert await filled.resolve(reference) == whole.id
    assert (await filled.resolve("report@best")).version == 1
    assert await filled.names() == ["report"]
    wrong = [each async for each in filled.verify() if each.state in ("corrupt", "missing")]
    assert any("version 4" in each.why for each in wrong)


@pytest.mark.parametrize("what", ["manifest", "blob"])
async def test_a_damaged_version_may_be_given_up(filled: CartridgeStore, whole: Manifest, what: str) -> None:
    await damage(filled, what)
    with pytest.raises(Conflict, match="prod"):
        await filled.delete("report", 4)
    await filled.tag("report", "prod", 2)
    await filled.delete("report", 4)
    for _ in range(2):
        assert await filled.resolve("report") == await filled.resolve("report@prod") == whole.id
        with pytest.raises(CartridgeNotFound):
            await filled.resolve("report@4")
        await filled.rebuild(force=True)


@pytest.mark.parametrize("what", ["manifest", "blob"])
async def test_a_damaged_version_may_be_restored(filled: CartridgeStore, what: str) -> None:
    key, content = await damage(filled, what)
    await filled.objects.put(key, [content])
    await filled.rebuild(force=True)
    assert (await filled.resolve("report")).version == (await filled.resolve("report@prod")).version == 4


async def test_a_newer_version_decides(filled: CartridgeStore) -> None:
    await damage(filled, "manifest")
    await filled.acquire("report", "run-a", 2)
    newer = await publish(filled, 9, attempt=2)
    assert await filled.resolve("report") == newer.id
    with pytest.raises(DigestMismatch, match="version 4"):
        await filled.resolve("report@prod")


async def test_a_name_of_which_all_is_damaged_is_still_a_name(filled: CartridgeStore) -> None:
    for version in (1, 2, 4):
        await filled.objects.put(f"cartridges/report/{version:010d}.json", [b"{"])
    await flush(filled)
    assert await filled.names() == ["report"]
    with pytest.raises(DigestMismatch, match="version 4"):
        await filled.resolve("report")
    await filled.delete("report")
    with pytest.raises(CartridgeNotFound):
        await filled.resolve("report")
    assert await filled.names() == []


async def test_the_collector_does_not_decide(filled: CartridgeStore, store_settings: StoreSettings) -> None:
    await damage(filled, "blob")
    collecting = await CartridgeStore.open(store_settings.model_copy(update={"sweep_grace_seconds": 0}))
    assert "report@4" not in [each.key async for each in collecting.gc()]
    await collecting.close()
    with pytest.raises(DigestMismatch):
        await filled.resolve("report")


async def test_without_redis_it_is_refused_as_well(
    filled: CartridgeStore, store_settings: StoreSettings, whole: Manifest, valkey: Valkey
) -> None:
    await damage(filled, "manifest")
    valkey.kill()
    # One that has not met the name before.
    other = await CartridgeStore.open(store_settings)
    for reference in ("report", "report@prod", "report@4"):
        with pytest.raises(DigestMismatch, match="version 4"):
            await other.resolve(reference)
    assert await other.resolve("report@2") == whole.id
    assert await other.resolve(f"report@{whole.digest}") == whole.id
    assert (await other.resolve("report@best")).version == 1
    await other.close()
