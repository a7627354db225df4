"""The KV of documents, computed once each and kept within a budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from foundry.errors import ContextNotFound, ResourceExhausted
from foundry.identity import ids_digest
from foundry.model.lm import FrozenLM
from services.teacher import metrics


class Contexts:
    """Document KV [L, 2, G, P, D] by the digest of its token ids. Used from one thread."""

    def __init__(self, lm: FrozenLM, budget_bytes: int) -> None:
        self._lm = lm
        self._budget_bytes = budget_bytes
        metrics.CONTEXT_BUDGET_BYTES.set(budget_bytes)
        # Oldest use first.
        self._resident: OrderedDict[str, Tensor] = OrderedDict()

    def put(self, ids: Sequence[int]) -> str:
        """The digest of the context, whose KV is resident then. Raises ResourceExhausted if it can never fit."""
        digest = ids_digest(ids)
        if digest in self._resident:
            self._resident.move_to_end(digest)
            metrics.CONTEXT_REQUESTS.labels("hit").inc()
            return digest
        metrics.CONTEXT_REQUESTS.labels("miss").inc()
        num_bytes = len(ids) * self._lm.spec.kv_bytes_per_token(self._lm.dtype)
        if num_bytes > self._budget_bytes:
            raise ResourceExhausted(
                f"the context's KV takes {num_bytes} bytes, the teacher's budget is {self._budget_bytes}: "
                "raise context_budget_bytes or shorten the document"
            )
        while self.num_bytes() + num_bytes > self._budget_bytes:
            self._resident.popitem(last=False)
            metrics.CONTEXT_EVICTIONS.inc()
        with metrics.PREFILL_SECONDS.time():
            self._resident[digest] = self._lm.prefill(ids)
        metrics.CONTEXTS.set(len(self._resident))
        metrics.CONTEXT_BYTES.set(self.num_bytes())
        return digest

    def get(self, digest: str) -> Tensor:
        """The KV of a context. Raises ContextNotFound: nothing else is ever scored in its place."""
        if digest not in self._resident:
            metrics.CONTEXT_REQUESTS.labels("absent").inc()
            raise ContextNotFound(f"context {digest} is not resident: put it again")
        self._resident.move_to_end(digest)
        return self._resident[digest]

    def num_bytes(self) -> int:
        return sum(kv.nbytes for kv in self._resident.values())
