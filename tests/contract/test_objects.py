"""Object storage behind its typed edge, on local files."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from foundry.errors import NotFound, StoreUnavailable
from foundry.identity import Buffer
from foundry.store import Objects


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return Objects.open(f"file://{tmp_path}/with%20space/objects", retry_seconds=1)


async def test_parts_are_written_one_after_the_other(objects: Objects, tmp_path: Path) -> None:
    parts: list[Buffer] = [b"head", bytearray(b"body"), memoryview(b"..tail")[2:]]
    await objects.put("a/b.bin", parts)
    assert bytes(await objects.get("a/b.bin")) == b"headbodytail"
    assert (tmp_path / "with space/objects/a/b.bin").read_bytes() == b"headbodytail"


async def test_of_many_that_create_one_wins(objects: Objects) -> None:
    won = await asyncio.gather(*(objects.put_if_absent("key", b"%d" % number) for number in range(16)))
    assert sum(won) == 1
    assert bytes(await objects.get("key")) == b"%d" % won.index(True)


async def test_what_is_not_there(objects: Objects) -> None:
    with pytest.raises(NotFound):
        await objects.get("absent")
    assert not await objects.exists("absent")
    await objects.delete("absent")
    assert await objects.keys("absent") == []
    assert await objects.keys_here("absent") == []


async def test_listing_is_by_directory(objects: Objects) -> None:
    for key in ("a/2", "a/1", "a/deep/3", "ab/4"):
        await objects.put(key, [b"x"])
    assert await objects.keys("a") == ["a/1", "a/2", "a/deep/3"]
    assert await objects.keys_here("a") == ["a/1", "a/2"]


async def test_a_directory_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreUnavailable):
        Objects.open(f"file://{tmp_path}/file/objects", retry_seconds=1)


async def test_a_storage_that_does_not_answer_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT": "http://127.0.0.1:9",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    remote = Objects.open("s3://bucket/prefix", retry_seconds=0.1)
    async with asyncio.timeout(20):
        with pytest.raises(StoreUnavailable):
            await remote.get("key")
