"""What engine and connector know of each other: the cartridges before each sequence, and what became of them.

Both are in one process, so nothing is sent: vLLM makes the connector from a module's name, and it finds the prefixes
under the number that its configuration names.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor


@dataclass(eq=False, slots=True)
class Prefix:
    """The cartridges of one sequence, in order, fixed at admission: KV [P, L, 2, G, D] each, in host memory.

    Token by token, so that what is missing behind a cached beginning is one block of memory.
    """

    kvs_PL2GD: Sequence[Tensor]
    # Of all cartridges: the sequence's own tokens begin at this position.
    num_tokens: int
    # When vLLM gave the sequence its place, in `time.perf_counter()`.
    scheduled_at: float = 0.0
    # All tokens are in vLLM's KV memory: they were cached there under these digests, or have been written.
    in_place: bool = False

    def after(self, begin: int) -> Iterator[Tensor]:
        """KV [n, L, 2, G, D] of the tokens from `begin` on, in pieces that are whole in memory."""
        for kv_PL2GD in self.kvs_PL2GD:
            if begin < len(kv_PL2GD):
                yield kv_PL2GD[begin:]
            begin = max(0, begin - len(kv_PL2GD))


class Prefixes(dict[str, Prefix]):
    """Of the sequences in flight, by their ids."""

    def __init__(self) -> None:
        super().__init__()
        # vLLM's, for its usage.
        self.block_pool: Any = None
        self.number = str(next(_numbers))
        _all[self.number] = self

    @staticmethod
    def find(number: str) -> Prefixes:
        """Those of the engine that wrote `number` into the connector's configuration."""
        return _all[number]


_numbers = count()
_all: weakref.WeakValueDictionary[str, Prefixes] = weakref.WeakValueDictionary()
