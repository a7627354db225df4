"""A cartridge on its way in: hashed while it arrives, and nobody's to use until its digest is right."""

from __future__ import annotations

import time
from threading import Condition, Thread
from types import TracebackType

from foundry.buffers import allocate
from foundry.identity import CartridgeBytes, CartridgeHeader, Digester
from foundry.store import metrics


class Incoming:
    """Memory for one cartridge, filled from the front; a thread of its own follows and hashes.

    A context manager: the thread ends with it.
    """

    def __init__(self, header: CartridgeHeader) -> None:
        self.header = header
        self.memory = allocate(header.num_bytes)
        self._digester = Digester(header)
        self._changed = Condition()
        self._landed = 0
        self._closed = False
        self._hash_seconds = 0.0
        self._hashing = Thread(target=self._hash, name="hash cartridge", daemon=True)

    def __enter__(self) -> Incoming:
        self._hashing.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._hashing.join()

    def landed(self, end: int) -> None:
        """Bytes [0, end) of `memory` are there and will not change."""
        with self._changed:
            self._landed = end
            self._changed.notify()

    def finish(self, digest: str) -> CartridgeBytes:
        """The cartridge, once all has landed. Raises DigestMismatch unless these are the bytes `digest` names."""
        with metrics.STAGE_SECONDS.labels("fetch", "verify").time():
            self.landed(self.header.num_bytes)
            self.__exit__(None, None, None)
            self._digester.verify(digest)
        metrics.STAGE_SECONDS.labels("fetch", "hash").observe(self._hash_seconds)
        return CartridgeBytes(self.header, self.memory)

    def _hash(self) -> None:
        begin = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda begin=begin: self._landed > begin or self._closed)  # type: ignore[misc]
                # All that has landed meanwhile at once: a longer piece is shared by more threads.
                end = self._landed
            if end == begin:
                return
            began = time.perf_counter()
            self._digester.update(self.memory[begin:end])
            self._hash_seconds += time.perf_counter() - began
            begin = end
