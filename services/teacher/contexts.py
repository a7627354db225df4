"""The KV of documents, computed once each and kept within a budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from foundry.errors import ContextNotFound, ResourceExhausted
from foundry.identity import ids_digest
from foundry.model.lm import FrozenLM
from services.teacher import metrics


class Key(NamedTuple):
    """Whose context, and the digest of its token ids: nobody learns from the time an answer takes what others put."""

    tenant: str
    digest: str


@dataclass(slots=True)
class _Begun:
    """A context whose first `num_tokens` have their KV."""

    key: Key
    kv_L2GPD: Tensor
    num_tokens: int = 0


class Contexts:
    """Document KV [L, 2, G, P, D]. Used from one thread."""

    def __init__(self, lm: FrozenLM, budget_bytes: int) -> None:
        self._lm = lm
        self._budget_bytes = budget_bytes
        metrics.CONTEXT_BUDGET_BYTES.set(budget_bytes)
        # Oldest use first.
        self._resident: OrderedDict[Key, Tensor] = OrderedDict()
        # The last one that was given up half way.
        self._begun: _Begun | None = None

    def put(self, tenant: str, ids: Sequence[int], go_on: Callable[[], None]) -> str:
        """The digest of the tenant's context, whose KV is resident then. Raises ResourceExhausted if it never fits.

        `go_on` is called time and again, and raises when nobody waits any more. Who asks again finds what there was.
        """
        key = Key(tenant, ids_digest(ids))
        if key in self._resident:
            self._resident.move_to_end(key)
            metrics.CONTEXT_REQUESTS.labels("hit").inc()
            return key.digest
        metrics.CONTEXT_REQUESTS.labels("miss").inc()
        num_bytes = len(ids) * self._lm.spec.kv_bytes_per_token(self._lm.dtype)
        if num_bytes > self._budget_bytes:
            raise ResourceExhausted(
                f"the context's KV takes {num_bytes} bytes, the teacher's budget is {self._budget_bytes}: "
                "raise context_budget_bytes or shorten the document"
            )
        begun = self._begun
        if begun is None or begun.key != key:
            # Room first: this one's goes with its tensor.
            begun = self._begun = None
            while self.num_bytes() + num_bytes > self._budget_bytes:
                self._resident.popitem(last=False)
                metrics.CONTEXT_EVICTIONS.inc()
            begun = self._begun = _Begun(key, self._lm.unfilled(ids))
        with metrics.PREFILL_SECONDS.time():
            for num_tokens in self._lm.fill(begun.kv_L2GPD, ids, begun.num_tokens):
                begun.num_tokens = num_tokens
                go_on()
        self._begun = None
        self._resident[key] = begun.kv_L2GPD
        metrics.CONTEXTS.set(len(self._resident))
        metrics.CONTEXT_BYTES.set(self.num_bytes())
        return key.digest

    def get(self, key: Key) -> Tensor:
        """The KV of a context. Raises ContextNotFound: nothing else is ever scored in its place."""
        if key not in self._resident:
            metrics.CONTEXT_REQUESTS.labels("absent").inc()
            raise ContextNotFound(f"context {key.digest} is not resident: put it again")
        self._resident.move_to_end(key)
        return self._resident[key]

    def num_bytes(self) -> int:
        begun = self._begun.kv_L2GPD.nbytes if self._begun is not None else 0
        return begun + sum(kv.nbytes for kv in self._resident.values())
