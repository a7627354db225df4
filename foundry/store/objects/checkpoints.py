"""Checkpoints of runs: the trainer's state, in object storage only.

A checkpoint without its json is half written and does not exist. Nothing is ever overwritten, and a later attempt sorts
after an earlier one, so a worker that was replaced can't put its state over its successor's.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable

import structlog
from blake3 import blake3
from pydantic import Field

from foundry.errors import DigestMismatch, NotFound
from foundry.identity import Buffer, content_digest
from foundry.store.objects import layout
from foundry.store.objects.objects import Objects
from foundry.store.spec import Digest
from foundry.store.unreadable import reading
from foundry.untrusted import parse_object
from foundry.validation import Checked

log = structlog.get_logger(__name__)

# The newest, and the one before it in case the newest is damaged.
_KEPT = 2
_RANGE_BYTES = 2**23


class _Checkpoint(Checked):
    digest: Digest
    num_bytes: int = Field(ge=0, le=2**53)


class Checkpoints:
    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    async def save(self, run_id: str, attempt: int, step: int, parts: Iterable[Buffer]) -> str:
        """Write a checkpoint, then delete the one before the previous. Returns its digest.

        Raises StoreFull or StoreUnavailable; the previous checkpoint then stands.
        """
        parts = list(parts)
        digest = await asyncio.to_thread(_digest, parts)
        stem = layout.checkpoint(run_id, attempt, step)
        await self._objects.put(f"{stem}.safetensors", parts)
        content = {"digest": digest, "num_bytes": sum(memoryview(part).nbytes for part in parts)}
        await self._objects.put(f"{stem}.json", [json.dumps(content).encode()])
        await self._prune(run_id, newest=stem)
        return digest

    async def load(self, run_id: str) -> tuple[int, bytes] | None:
        """Step and bytes of the newest checkpoint whose bytes are right; None if there is none.

        Raises DigestMismatch if there are checkpoints but all are damaged.
        """
        keys = await self._objects.keys_here(layout.checkpoints(run_id))
        failure: DigestMismatch | None = None
        for key in sorted((key for key in keys if key.endswith(".json")), reverse=True):
            match = layout.CHECKPOINT.fullmatch(key)
            if match is None:
                continue
            try:
                return int(match["step"]), await self._read(match["stem"])
            except DigestMismatch as error:
                log.error("checkpoint_damaged", key=key, error=error.message)
                failure = failure or error
        if failure is not None:
            raise failure
        return None

    async def check(self, stem: str) -> int:
        """Bytes of a checkpoint, hashed range by range. Raises NotFound if it is gone, DigestMismatch."""
        record, key = await self._record(stem), f"{stem}.safetensors"
        if (size := (await self._objects.head(key)).size) != record.num_bytes:
            raise DigestMismatch(f"{key} has {size} bytes, its record says {record.num_bytes}")
        hasher = blake3(max_threads=blake3.AUTO)
        for at in range(0, size, _RANGE_BYTES):
            with reading(key):
                part = await self._objects.get_range(key, at, min(at + _RANGE_BYTES, size))
            await asyncio.to_thread(hasher.update, part)
        if (found := f"blake3:{hasher.hexdigest()}") != record.digest:
            raise DigestMismatch(f"{key} hashes to {found}, expected {record.digest}")
        return size

    async def _read(self, stem: str) -> bytes:
        record = await self._record(stem)
        try:
            with reading(f"{stem}.safetensors"):
                content = bytes(await self._objects.get(f"{stem}.safetensors", max_bytes=record.num_bytes))
        except NotFound as error:
            raise DigestMismatch(f"the bytes of checkpoint {stem} are gone") from error
        if (found := await asyncio.to_thread(content_digest, content)) != record.digest:
            raise DigestMismatch(f"checkpoint {stem} hashes to {found}, expected {record.digest}")
        return content

    async def _record(self, stem: str) -> _Checkpoint:
        return await self._objects.record(
            f"{stem}.json", lambda content: _Checkpoint.model_validate(parse_object(content))
        )

    async def _prune(self, run_id: str, *, newest: str) -> None:
        keys = await self._objects.keys_here(layout.checkpoints(run_id))
        stems = sorted(
            {match["stem"] for key in keys if key.endswith(".json") and (match := layout.CHECKPOINT.fullmatch(key))}
        )
        # Only what is older than ours: a successor's files may be half written yet.
        kept = set([stem for stem in stems if stem <= newest][-_KEPT:])
        for stem in sorted({match["stem"] for key in keys if (match := layout.CHECKPOINT.fullmatch(key))}):
            if stem < newest and stem not in kept:
                # The json first: without it the rest is no checkpoint.
                await self._objects.delete(f"{stem}.json")
                await self._objects.delete(f"{stem}.safetensors")


def _digest(parts: list[Buffer]) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    for part in parts:
        hasher.update(part)
    return f"blake3:{hasher.hexdigest()}"
