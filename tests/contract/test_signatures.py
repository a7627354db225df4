"""A store with a key: what somebody else writes into its bucket is refused, and what the store wrote is read."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from foundry.errors import DigestMismatch, InvalidArgument
from foundry.store import CartridgeStore, DatasetSummary, RunState, StoreSettings, metrics
from foundry.store.sealed import seal
from foundry.store.signatures import Signer
from foundry.store.upkeep.sign import Signed
from tests.store_data import cartridge, claim, draft, run_spec

OLD, NEW = "old-key-" + "a" * 32, "new-key-" + "b" * 32
DATASET = "blake3:" + "ef" * 32
FIRST = Path("cartridges/report/0000000001.json")


@pytest.fixture
def bucket(store_settings: StoreSettings) -> Path:
    return Path(store_settings.objects_url.removeprefix("file://"))


@asynccontextmanager
async def opened(settings: StoreSettings, *keys: str) -> AsyncIterator[CartridgeStore]:
    if keys:
        file = Path(settings.objects_url.removeprefix("file://")).parent / f"{len(keys)}-{keys[0]}"
        file.write_text("\n".join(keys) + "\n")
        settings = settings.model_copy(update={"signing_key_file": file})
    store = await CartridgeStore.open(settings)
    try:
        yield store
    finally:
        await store.close()


async def fill(store: CartridgeStore) -> None:
    """One of everything that is believed because of where it stands."""
    for name, content in (("report", 0), ("other", 1)):
        await store.acquire(name, "run-a", 1)
        await store.publish(cartridge(content), draft(name), durable=True)
        await store.tag(name, "best", 1)
    await store.documents.put("a text")
    await store.datasets.append(DATASET, "asked", 0, [{"family": "prompts"}])
    await store.datasets.finish(DATASET, DatasetSummary(digest=DATASET, families={"prompts": {"conversations": 1}}))
    await store.runs.request_pause(await store.runs.create(run_spec("queued")))
    await store.runs.create(run_spec("trained"))
    claimed = await claim(store.runs, lease_seconds=3600)
    await store.runs.save_checkpoint(claimed.run_id, 1, 1, [b"state"])
    await store.runs.finish(claimed.run_id, 1, RunState.SUCCEEDED, result={"loss": 0.5})
    await store._marks.put("batch", [cartridge(7).digest()])


async def wrong(store: CartridgeStore) -> set[str]:
    return {each.key for each in [each async for each in store.verify()] if each.state != "ok"}


async def signed(store: CartridgeStore) -> list[Signed]:
    return [each async for each in store.sign()]


def records(bucket: Path) -> dict[str, bytes]:
    return {str(path.relative_to(bucket)): path.read_bytes() for path in bucket.glob("**/*.json*")}


def passed_off(bucket: Path) -> None:
    """Bytes of `other` as `report`'s: whoever can write to the bucket can compute every checksum."""
    theirs, ours = (json.loads((bucket / "cartridges" / name / FIRST.name).read_text().splitlines()[0])
                    for name in ("other", "report"))  # fmt: skip
    record = ours | {"digest": theirs["digest"], "header": theirs["header"]}
    record.pop("checksum")
    (bucket / FIRST).write_text(seal(record))


async def test_bytes_of_another_cartridge_are_not_passed_off(store_settings: StoreSettings, bucket: Path) -> None:
    async with opened(store_settings) as unsigned:
        await fill(unsigned)
        passed_off(bucket)
        await unsigned.rebuild(force=True)
        assert (await unsigned.resolve("report")).digest == cartridge(1).digest()
    shutil.rmtree(bucket)
    async with opened(store_settings, NEW) as store:
        await store._connection.redis.flushall()
        await fill(store)
        assert await wrong(store) == set()
        passed_off(bucket)
        before = metrics.UNREADABLE.labels("manifest")._value.get()
        await store.rebuild(force=True)
        assert metrics.UNREADABLE.labels("manifest")._value.get() == before + 1
        for reference in ("report", "report@best"):
            with pytest.raises(DigestMismatch, match="damaged"):
                await store.resolve(reference)
        with pytest.raises(DigestMismatch, match="no signature"):
            await store._durable.manifest("report", 1)
        assert {str(FIRST)} <= await wrong(store)
        assert (await store.resolve("other")).digest == cartridge(1).digest()


async def test_every_record_is_signed_at_its_place(store_settings: StoreSettings, bucket: Path) -> None:
    async with opened(store_settings, NEW) as store:
        await fill(store)
    signer = Signer([NEW])
    stored = records(bucket)
    assert len(stored) == 14
    for place, content in stored.items():
        assert signer.opened(place, content)
        for other in stored.keys() - {place}:
            with pytest.raises(InvalidArgument, match="not of this place"):
                signer.opened(other, content)


async def test_a_record_moved_to_another_place_is_refused(store_settings: StoreSettings, bucket: Path) -> None:
    async with opened(store_settings, NEW) as store:
        await fill(store)
        tags = bucket / "cartridges/report/tags"
        shutil.copy(tags / "best.json", tags / "prod.json")
        with pytest.raises(DigestMismatch, match="not of this place"):
            await store._durable.tag_record("report", "prod")
        assert "report@prod" in await wrong(store)
    # Without a key nothing of the kind is seen.
    async with opened(store_settings) as unsigned:
        assert await unsigned._durable.tag_record("report", "prod") is not None


async def test_any_key_of_the_file_is_taken_and_the_first_one_signs(store_settings: StoreSettings) -> None:
    async with opened(store_settings, OLD) as store:
        await fill(store)
    async with opened(store_settings, NEW, OLD) as store:
        assert await wrong(store) == set()
        await store.documents.put("a text of the new key")
    async with opened(store_settings, OLD) as store:
        assert len(await wrong(store)) == 1
    # So that the old one can be taken out.
    async with opened(store_settings, NEW, OLD) as store:
        assert {each.state for each in await signed(store)} == {"signed"}
        assert await signed(store) == []
    async with opened(store_settings, NEW) as store:
        assert await wrong(store) == set()


async def test_what_was_written_before_the_key_is_signed_once(store_settings: StoreSettings, bucket: Path) -> None:
    async with opened(store_settings) as unsigned:
        await fill(unsigned)
    damaged = bucket / "cartridges/other/0000000001.json"
    damaged.write_bytes(damaged.read_bytes().replace(b"other", b"ohter", 1))
    foreign = bucket / "cartridges/other/tags/best.json"
    foreign.write_bytes(Signer([OLD]).signed("cartridges/other/tags/best.json", foreign.read_bytes()))
    async with opened(store_settings, NEW) as store:
        assert str(FIRST) in await wrong(store)
        found = await signed(store)
        refused = {each.key: each.why for each in found if each.state == "refused"}
        assert set(refused) == {str(path.relative_to(bucket)) for path in (damaged, foreign)}
        assert all(refused.values())
        assert len(found) == 14
        await store.rebuild(force=True)
        assert (await store.resolve("report@best")).digest == cartridge(0).digest()
        assert str(FIRST) not in await wrong(store)
        assert {each.key for each in await signed(store)} == set(refused)
    async with opened(store_settings) as unsigned:
        assert (await unsigned._durable.manifest("report", 1)).digest == cartridge(0).digest()


async def test_the_command_says_what_it_signed(store_settings: StoreSettings, tmp_path: Path) -> None:
    async with opened(store_settings) as unsigned:
        await fill(unsigned)
    key = tmp_path / "key"
    key.write_text(NEW)
    values: dict[str, Any] = {
        "redis_url": store_settings.redis_url.get_secret_value(),
        "objects_url": store_settings.objects_url,
        "signing_key_file": key,
    }
    environment = {f"FOUNDRY_STORE__{name.upper()}": str(value) for name, value in values.items()}
    command = [sys.executable, "-m", "foundry.cli.main", "store", "sign"]
    done = await asyncio.to_thread(
        subprocess.run, command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"signed    {FIRST}" in done.stdout
    assert "Signed 14 records; none refused." in done.stderr


@pytest.mark.parametrize("content", [None, b"", b"short\n", b"\xff" * 40, b"two words of " + b"a" * 32])
def test_a_key_file_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidArgument, match=str(file)) as caught:
        Signer.of(file)
    assert "short" not in caught.value.message
