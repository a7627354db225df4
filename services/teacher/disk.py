"""Contexts on a disk: in a directory of this teacher alone, where they outlive it.

A file is a SHA-256 and then the KV's bytes. The digest is over what the file is named by, which is itself a digest of
whose context it is, of which tokens and of which model, and over every page: a damaged file, or one under another's
name, is never read for what it isn't. Names give nothing away.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import torch
from torch import Tensor

from foundry.errors import InvalidArgument
from services.teacher import metrics
from services.teacher.pages import PAGE_BYTES, Key, pages_of
from services.teacher.tier import Tier

# Not structlog: this is measured where only torch and transformers are.
log = logging.getLogger(__name__)

_FORMAT = "foundry-context/1"
_DIGEST_BYTES = 32
# Pages that are read, checked and copied at once.
_NUM_READERS = 8


class DiskContexts:
    """Used from one thread; a second one writes."""

    name = "disk"

    def __init__(self, directory: Path, budget_bytes: int, model: str) -> None:
        """`model` says all that decides, beside its tokens, what a context's KV is.

        Raises InvalidArgument if the directory can't be used.
        """
        self._directory, self._model = directory, model
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="context-writer")
        self._readers = ThreadPoolExecutor(max_workers=_NUM_READERS, thread_name_prefix="context-reader")
        self._writes: dict[Key, Future[None]] = {}
        # Of file names; held while files are read, so that none is removed then.
        self._lock = Lock()
        self._tier: Tier[str, None] = Tier(self.name, budget_bytes, self._leave)
        try:
            self._take_over()
        except OSError as error:
            raise InvalidArgument(
                f"contexts can't be kept in {directory}: {error}; give the teacher a directory that it may write to",
                field="disk_context_directory",
            ) from error

    def kv_bytes(self, key: Key) -> int | None:
        """Of a context that is here, which is now the most recently used."""
        name = self._name(key)
        with self._lock:
            if name not in self._tier:
                return None
            self._tier.use(name)
            # A damaged one may be shorter than its digest.
            return max(0, self._tier.bytes_of(name) - _DIGEST_BYTES)

    def keep(self, key: Key, kv_L2GPD: Tensor) -> None:
        """Begin to write it, unless it is here. The tensor is read until `wait` returns, on a stream of its own."""
        if self.kv_bytes(key) is None:
            self._writes[key] = self._writer.submit(self._write, self._name(key), pages_of(kv_L2GPD))

    def wait(self, key: Key) -> None:
        """Until it is written, if that was begun."""
        if (write := self._writes.pop(key, None)) is not None:
            write.result()

    def load(self, key: Key, kv_L2GPD: Tensor) -> bool:
        """Into a tensor of its size. Whether that could be done: what is damaged is removed, counted and logged."""
        name, pages = self._name(key), pages_of(kv_L2GPD)
        path = self._directory / name
        with self._lock:
            if name not in self._tier:
                return False
            self._tier.use(name)
            try:
                with path.open("rb") as file:
                    digest = file.read(_DIGEST_BYTES)
                offsets = range(_DIGEST_BYTES, _DIGEST_BYTES + kv_L2GPD.nbytes, PAGE_BYTES)
                digests = self._readers.map(partial(_read, path), offsets, pages)
                if digest != _digest(name, digests):
                    raise OSError("its bytes are not those that were written")
                # How old it is, to the next teacher.
                os.utime(path)
            except OSError as error:
                _failed("read", path, error)
                # What can't be removed goes on taking its room.
                with suppress(OSError):
                    self._tier.remove(name)
                return False
        return True

    def close(self) -> None:
        """What is not being written yet never is."""
        self._writer.shutdown(cancel_futures=True)
        self._readers.shutdown()

    def _take_over(self) -> None:
        """What a teacher before this one has left; of other models too, which may come back."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self._directory.glob("*.tmp"):
            path.unlink()
        found = sorted((path.stat().st_mtime, path) for path in self._directory.glob("*.kv"))
        for _, path in found:
            self._tier.add(path.name, None, path.stat().st_size)
        self._tier.make_room(0)

    def _name(self, key: Key) -> str:
        return sha256(json.dumps([_FORMAT, self._model, *key]).encode()).hexdigest() + ".kv"

    def _write(self, name: str, pages: Sequence[Tensor]) -> None:
        num_bytes = _DIGEST_BYTES + sum(map(len, pages))
        path = self._directory / name
        unfinished = path.with_suffix(".tmp")
        stream = torch.cuda.Stream(pages[0].device) if pages[0].is_cuda else None  # type: ignore[no-untyped-call]
        try:
            with self._lock:
                # No other thread makes room: it stays free while the file is written.
                if not self._tier.make_room(num_bytes):
                    return
            unfinished.touch(mode=0o600)
            with unfinished.open("wb") as file, torch.cuda.stream(stream):
                file.write(bytes(_DIGEST_BYTES))
                digest = _digest(name, (_append(file, page) for page in pages))
                file.seek(0)
                file.write(digest)
            unfinished.replace(path)
        except OSError as error:
            _failed("write", path, error)
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            return
        with self._lock:
            self._tier.add(name, None, num_bytes)

    def _leave(self, name: str, _: None) -> None:
        (self._directory / name).unlink(missing_ok=True)


def _read(path: Path, offset: int, page: Tensor) -> bytes:
    """Fills the page; its digest."""
    staging = torch.empty(page.shape, dtype=page.dtype, pin_memory=True) if page.is_cuda else page
    buffer = staging.numpy().data
    with path.open("rb") as file:
        file.seek(offset)
        if file.readinto(buffer) != len(buffer):
            raise OSError("it is shorter than it was written")
    if page.is_cuda:
        page.copy_(staging)
    return sha256(buffer).digest()


def _append(file: BinaryIO, page: Tensor) -> bytes:
    """Writes the page; its digest."""
    buffer = page.cpu().numpy().data
    file.write(buffer)
    return sha256(buffer).digest()


def _digest(name: str, pages: Iterable[bytes]) -> bytes:
    return sha256(b"".join([name.encode(), *pages])).digest()


def _failed(operation: str, path: Path, error: OSError) -> None:
    metrics.CONTEXT_FILE_ERRORS.labels(operation).inc()
    log.warning("context file failed", extra={"operation": operation, "file": path.name, "error": str(error)})
