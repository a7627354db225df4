"""Checkpoints of runs: which one comes back, and what becomes of those that are half written, damaged or too many."""

from __future__ import annotations

from pathlib import Path

import pytest

from foundry.errors import DigestMismatch, StoreFull
from foundry.store import RunStore
from tests.store_data import claim, run_spec


def checkpoints(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("objects/runs/*/checkpoints/*"))


async def test_a_checkpoint_comes_back(runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    await claim(runs)
    assert await runs.load_checkpoint(run_id) is None
    await runs.save_checkpoint(run_id, 1, 5, [b"master", memoryview(b"moments")])
    assert await runs.load_checkpoint(run_id) == (5, b"mastermoments")


async def test_the_newest_two_checkpoints_are_kept(runs: RunStore, tmp_path: Path) -> None:
    run_id = await runs.create(run_spec())
    await claim(runs)
    for step in (9, 10, 11):
        await runs.save_checkpoint(run_id, 1, step, [b"%d" % step])
    assert await runs.load_checkpoint(run_id) == (11, b"11")
    stems = ["000001-0000000010", "000001-0000000011"]
    assert checkpoints(tmp_path) == [f"{stem}.{kind}" for stem in stems for kind in ("json", "safetensors")]


async def test_a_later_attempt_counts_even_at_an_earlier_step(runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    await claim(runs, lease_seconds=0.05)
    await runs.save_checkpoint(run_id, 1, 9, [b"old"])
    await claim(runs, "worker-1")
    await runs.save_checkpoint(run_id, 2, 6, [b"new"])
    assert await runs.load_checkpoint(run_id) == (6, b"new")
    # A replaced worker that was past the check when it was replaced.
    await runs._checkpoints.save(run_id, 1, 12, [b"late"])
    assert await runs.load_checkpoint(run_id) == (6, b"new")


async def test_a_half_written_checkpoint_does_not_exist(runs: RunStore, tmp_path: Path) -> None:
    run_id = await runs.create(run_spec())
    await claim(runs)
    await runs.save_checkpoint(run_id, 1, 5, [b"whole"])
    await runs._checkpoints._objects.put(f"runs/{run_id}/checkpoints/000001-0000000006.safetensors", [b"ha"])
    assert await runs.load_checkpoint(run_id) == (5, b"whole")
    await runs.save_checkpoint(run_id, 1, 7, [b"next"])
    await runs.save_checkpoint(run_id, 1, 8, [b"next"])
    assert not [name for name in checkpoints(tmp_path) if "0000000006" in name], "garbage is kept"


async def test_a_damaged_checkpoint_gives_way_to_the_one_before(runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    await claim(runs)
    await runs.save_checkpoint(run_id, 1, 5, [b"five"])
    await runs.save_checkpoint(run_id, 1, 6, [b"six"])
    objects = runs._checkpoints._objects
    await objects.put(f"runs/{run_id}/checkpoints/000001-0000000006.safetensors", [b"sex"])
    assert await runs.load_checkpoint(run_id) == (5, b"five")
    await objects.delete(f"runs/{run_id}/checkpoints/000001-0000000005.safetensors")
    with pytest.raises(DigestMismatch):
        await runs.load_checkpoint(run_id)


@pytest.mark.parametrize("record", [b"", b"[]", b"{}", b'{"digest": "bl\xe1ke3:"}'])
async def test_a_checkpoint_whose_record_is_damaged_gives_way_to_the_one_before(runs: RunStore, record: bytes) -> None:
    run_id = await runs.create(run_spec())
    await claim(runs)
    await runs.save_checkpoint(run_id, 1, 5, [b"five"])
    await runs.save_checkpoint(run_id, 1, 6, [b"six"])
    await runs._checkpoints._objects.put(f"runs/{run_id}/checkpoints/000001-0000000006.json", [record])
    assert await runs.load_checkpoint(run_id) == (5, b"five")


async def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(
    runs: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = await runs.create(run_spec())
    await claim(runs)
    await runs.save_checkpoint(run_id, 1, 5, [b"five"])

    async def full(*_: object) -> None:
        raise StoreFull("no space left")

    monkeypatch.setattr(runs._checkpoints._objects, "put", full)
    with pytest.raises(StoreFull):
        await runs.save_checkpoint(run_id, 1, 6, [b"six"])
    assert await runs.load_checkpoint(run_id) == (5, b"five")
