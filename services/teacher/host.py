"""Contexts that left the device, in the host's memory: pinned on CUDA, where a copy then runs at the bus's speed."""

from __future__ import annotations

import torch
from torch import Tensor

from services.teacher.pages import PAGE_BYTES, Key, pages_of
from services.teacher.tier import Tier


class HostContexts:
    """KV in whole pages. Used from one thread, in whose CUDA stream all copies are: each waits for those before."""

    name = "host"

    def __init__(self, budget_bytes: int, *, pinned: bool) -> None:
        self._pinned = pinned
        # With each its KV's size in bytes.
        self._tier: Tier[Key, tuple[int, list[Tensor]]] = Tier(self.name, budget_bytes, self._leave)
        self.held = self._tier.held
        # Used again, never given back: pinning memory takes longer than copying into it.
        self._free: list[Tensor] = []

    def kv_bytes(self, key: Key) -> int | None:
        """Of a context that is here, which is now the most recently used."""
        entry = self._tier.use(key)
        return None if entry is None else entry[0]

    def keep(self, key: Key, kv_L2GPD: Tensor) -> None:
        """Copy it here, unless it is here or there is no place."""
        pages = pages_of(kv_L2GPD)
        num_bytes = len(pages) * PAGE_BYTES
        if key in self._tier or not self._tier.make_room(num_bytes):
            return
        copies = [self._free.pop() if self._free else self._new_page() for _ in pages]
        for page, copy in zip(pages, copies, strict=True):
            copy[: len(page)].copy_(page, non_blocking=True)
        self._tier.add(key, (kv_L2GPD.nbytes, copies), num_bytes)

    def load(self, key: Key, kv_L2GPD: Tensor) -> bool:
        """Into a tensor of its size. Whether that could be done."""
        entry = self._tier.use(key)
        if entry is None:
            return False
        for page, copy in zip(pages_of(kv_L2GPD), entry[1], strict=True):
            page.copy_(copy[: len(page)], non_blocking=True)
        return True

    def _new_page(self) -> Tensor:
        return torch.empty(PAGE_BYTES, dtype=torch.uint8, pin_memory=self._pinned)

    def _leave(self, key: Key, entry: tuple[int, list[Tensor]]) -> None:
        self._free += entry[1]
