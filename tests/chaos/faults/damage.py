"""What is done to the store behind everybody's back."""

from __future__ import annotations

import random
from collections.abc import Callable

from foundry.errors import Conflict, Fenced
from foundry.model.cartridge import Cartridge
from foundry.store import ManifestDraft
from tests.chaos.faults.world import NAME, World

Change = Callable[[bytes], bytes]


async def chunk_keys(world: World, digest: str) -> list[bytes]:
    """Keys in Redis that hold tensor bytes of a cartridge, and not what describes them."""
    keys = [key async for key in world.redis.scan_iter(f"foundry:bytes:{digest}*")]
    return sorted([key for key in keys if await world.redis.strlen(key) > 1024])


async def flip_hot(world: World, rng: random.Random, digest: str) -> bool:
    return await _rewrite_hot(world, rng, digest, lambda chunk: _flipped(chunk, rng))


async def truncate_hot(world: World, rng: random.Random, digest: str) -> bool:
    return await _rewrite_hot(world, rng, digest, lambda chunk: chunk[: rng.randrange(len(chunk))])


async def delete_hot(world: World, rng: random.Random, digest: str) -> bool:
    keys = await chunk_keys(world, digest)
    return bool(keys) and bool(await world.redis.delete(rng.choice(keys)))


async def flip_blob(world: World, rng: random.Random, digest: str) -> bool:
    """At rest, and the hot copy is gone, so that the blob is what is read."""
    path = world.directory / "objects" / "blobs" / "blake3" / f"{digest.removeprefix('blake3:')}.safetensors"
    if not path.exists():
        return False
    # A file of its own: the old one may be mapped or be read just now.
    content = _flipped(path.read_bytes(), rng)
    path.unlink()
    path.write_bytes(content)
    await delete_hot(world, rng, digest)
    return True


async def intrude(world: World, rng: random.Random) -> bool:
    """Another run publishes under the name; it must not be able to."""
    stranger, other = f"stranger-{rng.randrange(10**6)}", _other_cartridge(world, rng)
    draft = ManifestDraft(name=NAME, run=stranger, attempt=1, step=0)
    try:
        await world.direct.acquire(NAME, stranger, 1)
    except Conflict:
        pass
    else:
        world.observer.violation(f"{stranger} acquired a name that a run holds")
    try:
        await world.direct.publish(other.to_bytes(), draft, durable=rng.random() < 0.5)
    except Fenced:
        pass
    else:
        world.observer.violation(f"{stranger} published under a name that a run holds")
    return True


async def take_over(world: World, rng: random.Random, run_id: str, step: int) -> None:
    """A newer attempt takes the run, publishes other bytes for its next step, and dies."""
    await world.direct.runs.requeue(run_id, (await world.direct.runs.get(run_id)).attempt)
    claimed = await world.direct.runs.claim("usurper", 600)
    assert claimed is not None
    assert claimed.run_id == run_id
    await world.direct.acquire(NAME, run_id, claimed.attempt)
    draft = ManifestDraft(name=NAME, run=run_id, attempt=claimed.attempt, step=step)
    await world.direct.publish(_other_cartridge(world, rng).to_bytes(), draft, durable=rng.random() < 0.5)


def _other_cartridge(world: World, rng: random.Random) -> Cartridge:
    start = world.start
    ids = [rng.randrange(3, world.lm.spec.vocab_size) for _ in range(start.header.num_tokens)]
    return Cartridge(start.header, world.lm.prefill(ids))


async def _rewrite_hot(world: World, rng: random.Random, digest: str, change: Change) -> bool:
    keys = await chunk_keys(world, digest)
    if not keys:
        return False
    key = rng.choice(keys)
    chunk = await world.redis.get(key)
    if not isinstance(chunk, bytes):
        return False
    await world.redis.set(key, change(chunk), keepttl=True)
    return True


def _flipped(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)
