"""Checkpoints of runs: the trainer's state, in object storage only.

    runs/<id>/checkpoints/<attempt:06d>-<step:010d>.safetensors
    runs/<id>/checkpoints/<attempt:06d>-<step:010d>.json           {digest, num_bytes}, written last
    runs/<id>/curriculum/<hex>.json                                what all checkpoints of a run share, by its digest

A checkpoint without its json is half written and does not exist. Nothing is ever overwritten, and a later attempt sorts
after an earlier one, so a worker that was replaced can't put its state over its successor's.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from datetime import datetime

import structlog
from blake3 import blake3

from foundry.errors import DigestMismatch, NotFound
from foundry.identity import Buffer, check_digest, content_digest
from foundry.store.objects.objects import ObjectInfo, Objects

log = structlog.get_logger(__name__)

# The newest, and the one before it in case the newest is damaged.
_KEPT = 2
_KEY = re.compile(r"(?P<stem>.*/(?P<attempt>[0-9]{6,})-(?P<step>[0-9]{10,}))\.(json|safetensors)")
_CURRICULUM_KEY = re.compile(r"runs/[^/]+/curriculum/[0-9a-f]{64}\.json")


class Checkpoints:
    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    async def save(self, run_id: str, attempt: int, step: int, parts: Iterable[Buffer]) -> str:
        """Write a checkpoint, then delete the one before the previous. Returns its digest.

        Raises StoreFull or StoreUnavailable; the previous checkpoint then stands.
        """
        parts = list(parts)
        digest = await asyncio.to_thread(_digest, parts)
        stem = f"runs/{run_id}/checkpoints/{attempt:06d}-{step:010d}"
        await self._objects.put(f"{stem}.safetensors", parts)
        content = {"digest": digest, "num_bytes": sum(memoryview(part).nbytes for part in parts)}
        await self._objects.put(f"{stem}.json", [json.dumps(content).encode()])
        await self._sweep(run_id, newest=stem)
        return digest

    async def load(self, run_id: str) -> tuple[int, bytes] | None:
        """Step and bytes of the newest checkpoint whose bytes are right; None if there is none.

        Raises DigestMismatch if there are checkpoints but all are damaged.
        """
        keys = await self._objects.keys_here(f"runs/{run_id}/checkpoints")
        failure: DigestMismatch | None = None
        for key in sorted((key for key in keys if key.endswith(".json")), reverse=True):
            match = _KEY.fullmatch(key)
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

    async def of_runs_that_ended(self, *, before: datetime) -> AsyncIterator[ObjectInfo]:
        """The files of all runs whose result was written before a time: of a checkpoint the json comes first, and the
        curriculum after all checkpoints, which are nothing without it."""
        over: set[str] = set()
        files: defaultdict[str, list[ObjectInfo]] = defaultdict(list)
        async for entry in self._objects.scan("runs"):
            run = entry.key.split("/")[1]
            if entry.key == f"runs/{run}/result.json" and entry.last_modified < before:
                over.add(run)
            elif _KEY.fullmatch(entry.key) or _CURRICULUM_KEY.fullmatch(entry.key):
                files[run].append(entry)
        for run in sorted(over & files.keys()):
            for entry in sorted(files[run], key=lambda entry: entry.key):
                yield entry

    async def delete(self, entry: ObjectInfo) -> None:
        await self._objects.delete(entry.key)

    async def _read(self, stem: str) -> bytes:
        record = bytes(await self._objects.get(f"{stem}.json"))
        try:
            expected = json.loads(record)["digest"]
        except (ValueError, KeyError, TypeError) as error:
            raise DigestMismatch(f"the record of checkpoint {stem} is damaged: {error!r}") from error
        try:
            content = bytes(await self._objects.get(f"{stem}.safetensors"))
        except NotFound as error:
            raise DigestMismatch(f"the bytes of checkpoint {stem} are gone") from error
        if (found := await asyncio.to_thread(content_digest, content)) != expected:
            raise DigestMismatch(f"checkpoint {stem} hashes to {found}, expected {expected}")
        return content

    async def _sweep(self, run_id: str, *, newest: str) -> None:
        keys = await self._objects.keys_here(f"runs/{run_id}/checkpoints")
        stems = sorted({match["stem"] for key in keys if key.endswith(".json") and (match := _KEY.fullmatch(key))})
        # Only what is older than ours: a successor's files may be half written yet.
        kept = set([stem for stem in stems if stem <= newest][-_KEPT:])
        for stem in sorted({match["stem"] for key in keys if (match := _KEY.fullmatch(key))}):
            if stem < newest and stem not in kept:
                # The json first: without it the rest is no checkpoint.
                await self._objects.delete(f"{stem}.json")
                await self._objects.delete(f"{stem}.safetensors")

    async def save_curriculum(self, run_id: str, content: bytes) -> str:
        """Keep what a run asks beside its checkpoints, and return its digest. Raises StoreFull, StoreUnavailable."""
        digest = content_digest(content)
        # Also over one that stands: it is the same, unless it is damaged, and then this repairs it.
        await self._objects.put(_curriculum_key(run_id, digest), [content])
        return digest

    async def load_curriculum(self, run_id: str, digest: str) -> bytes:
        """Raises DigestMismatch if it is gone or damaged."""
        key = _curriculum_key(run_id, digest)
        try:
            content = bytes(await self._objects.get(key))
        except NotFound as error:
            raise DigestMismatch(f"the curriculum {key} is gone: the run's checkpoints are of no use") from error
        if (found := content_digest(content)) != digest:
            raise DigestMismatch(f"the curriculum {key} hashes to {found}")
        return content


def _curriculum_key(run_id: str, digest: str) -> str:
    return f"runs/{run_id}/curriculum/{check_digest(digest, field='curriculum').removeprefix('blake3:')}.json"


def _digest(parts: list[Buffer]) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    for part in parts:
        hasher.update(part)
    return f"blake3:{hasher.hexdigest()}"
