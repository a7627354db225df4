"""What one kind of memory keeps within a budget. Of bytes and orders only: what is kept is the owner's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from services.teacher import metrics

K = TypeVar("K")
V = TypeVar("V")


class Tier(Generic[K, V]):
    """Entries that take at most `budget_bytes` together; the least recently used make room for others."""

    def __init__(self, name: str, budget_bytes: int, leave: Callable[[K, V], None]) -> None:
        """`leave` is called with each entry that has to go, while it still counts."""
        self.budget_bytes = budget_bytes
        metrics.CONTEXT_BUDGET_BYTES.labels(name).set(budget_bytes)
        self.num_bytes = 0
        # Entries that stay, whoever wants their room.
        self.held: set[K] = set()
        self._name, self._leave = name, leave
        # Least recently used first.
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._observe()

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def use(self, key: K) -> V | None:
        """The entry, which is now the most recently used."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def bytes_of(self, key: K) -> int:
        return self._entries[key][1]

    def make_room(self, num_bytes: int) -> bool:
        """Whether so many bytes are free now. If they never could be, nothing has left."""
        if sum(self.bytes_of(key) for key in self.held if key in self) + num_bytes > self.budget_bytes:
            return False
        while self.num_bytes + num_bytes > self.budget_bytes:
            self.remove(next(key for key in self._entries if key not in self.held))
            metrics.CONTEXT_EVICTIONS.labels(self._name).inc()
        return True

    def add(self, key: K, value: V, num_bytes: int) -> None:
        """Within the room that was made."""
        self._entries[key] = (value, num_bytes)
        self.num_bytes += num_bytes
        self._observe()

    def remove(self, key: K) -> None:
        value, num_bytes = self._entries[key]
        self._leave(key, value)
        del self._entries[key]
        self.num_bytes -= num_bytes
        self._observe()

    def _observe(self) -> None:
        metrics.CONTEXTS.labels(self._name).set(len(self._entries))
        metrics.CONTEXT_BYTES.labels(self._name).set(self.num_bytes)
