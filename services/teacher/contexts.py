"""The KV of documents, computed once each: on the device, and within budgets in the host's memory and on a disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foundry.errors import ContextNotFound, ResourceExhausted
from foundry.model.lm import FrozenLM
from services.teacher import metrics
from services.teacher.disk import DiskContexts
from services.teacher.host import HostContexts
from services.teacher.pages import Key
from services.teacher.tier import Tier


@dataclass(slots=True)
class _Begun:
    """A context whose first `num_tokens` have their KV."""

    key: Key
    kv_L2GPD: Tensor
    num_tokens: int = 0


class Contexts:
    """Document KV [L, 2, G, P, D]. Used from one thread.

    What is computed is on the device, and written to the disk meanwhile; what has to leave the device is copied to the
    host's memory. Nothing else is ever scored in a context's place: it comes back with the bits that it had.
    """

    def __init__(
        self, lm: FrozenLM, budget_bytes: int, host_budget_bytes: int = 0, disk: DiskContexts | None = None
    ) -> None:
        self._lm = lm
        self._device: Tier[Key, Tensor] = Tier("device", budget_bytes, self._leave_device)
        self._host = HostContexts(host_budget_bytes, pinned=lm.device.type == "cuda")
        self._disk = disk
        # The last one that was given up half way.
        self._begun: _Begun | None = None

    def put(self, key: Key, ids: Sequence[int], go_on: Callable[[], None]) -> None:
        """Afterwards the context's KV is on the device. Raises ResourceExhausted if it never fits.

        `go_on` is called time and again, and raises when nobody waits any more. Who asks again finds what there was.
        """
        if self._find(key) is not None:
            metrics.CONTEXT_REQUESTS.labels("hit").inc()
            return
        metrics.CONTEXT_REQUESTS.labels("miss").inc()
        begun = self._begun
        if begun is None or begun.key != key:
            # Room first: this one's goes with its tensor.
            begun = self._begun = None
            self._make_room(len(ids) * self._token_bytes)
            begun = self._begun = _Begun(key, self._lm.unfilled(len(ids)))
        with metrics.PREFILL_SECONDS.time():
            for num_tokens in self._lm.fill(begun.kv_L2GPD, ids, begun.num_tokens):
                begun.num_tokens = num_tokens
                go_on()
        self._begun = None
        self._device.add(key, begun.kv_L2GPD, begun.kv_L2GPD.nbytes)
        if self._disk is not None:
            self._disk.keep(key, begun.kv_L2GPD)

    def get(self, keys: Sequence[Key]) -> list[Tensor]:
        """The KV of each context, which must be `fitting`: those used last don't leave for each other then.

        Raises ContextNotFound.
        """
        found: dict[Key, Tensor] = {}
        for key in dict.fromkeys(keys):
            if (kv_L2GPD := self._find(key)) is None:
                raise _absent(key)
            found[key] = kv_L2GPD
        return [found[key] for key in keys]

    def fitting(self, keys: Sequence[Key]) -> Iterator[slice]:
        """Consecutive ones that fit on the device together. Raises ContextNotFound."""
        begin, together, num_bytes = 0, set[Key](), 0
        for index, key in enumerate(keys):
            if key not in together:
                kv_bytes = self._kv_bytes(key)
                if together and num_bytes + kv_bytes > self._device.budget_bytes:
                    yield slice(begin, index)
                    begin, together, num_bytes = index, set(), 0
                together.add(key)
                num_bytes += kv_bytes
        yield slice(begin, len(keys))

    def num_bytes(self) -> int:
        """On the device."""
        return self._device.num_bytes + (self._begun.kv_L2GPD.nbytes if self._begun is not None else 0)

    def close(self) -> None:
        if self._disk is not None:
            self._disk.close()

    @property
    def _token_bytes(self) -> int:
        return self._lm.spec.kv_bytes_per_token(self._lm.dtype)

    @property
    def _lower(self) -> Sequence[HostContexts | DiskContexts]:
        return [self._host] if self._disk is None else [self._host, self._disk]

    def _kv_bytes(self, key: Key) -> int:
        if key in self._device:
            return self._device.bytes_of(key)
        for tier in self._lower:
            if (kv_bytes := tier.kv_bytes(key)) is not None:
                return kv_bytes
        raise _absent(key)

    def _find(self, key: Key) -> Tensor | None:
        """On the device, where it may come back from a lower tier, and now the most recently used wherever it is."""
        lower = [(tier, kv_bytes) for tier in self._lower if (kv_bytes := tier.kv_bytes(key)) is not None]
        if (kv_L2GPD := self._device.use(key)) is not None:
            metrics.CONTEXT_HITS.labels("device").inc()
            return kv_L2GPD
        for tier, kv_bytes in lower:
            if (kv_L2GPD := self._reload(key, tier, kv_bytes)) is not None:
                return kv_L2GPD
        return None

    def _reload(self, key: Key, tier: HostContexts | DiskContexts, kv_bytes: int) -> Tensor | None:
        """None if what the tier has can't be used."""
        # Else what makes room on the device could take its place in the host's memory.
        self._host.held.add(key)
        try:
            with metrics.CONTEXT_RELOAD_SECONDS.labels(tier.name).time():
                self._make_room(kv_bytes)
                kv_L2GPD = self._lm.unfilled(kv_bytes // self._token_bytes)
                if not tier.load(key, kv_L2GPD):
                    return None
                if kv_L2GPD.is_cuda:
                    torch.cuda.current_stream(kv_L2GPD.device).synchronize()
        finally:
            self._host.held.clear()
        self._device.add(key, kv_L2GPD, kv_bytes)
        metrics.CONTEXT_HITS.labels(tier.name).inc()
        return kv_L2GPD

    def _make_room(self, num_bytes: int) -> None:
        """On the device. Raises ResourceExhausted."""
        if self.num_bytes() + num_bytes > self._device.budget_bytes:
            # Nobody waits for it.
            self._begun = None
        if not self._device.make_room(num_bytes):
            raise ResourceExhausted(
                f"the context's KV takes {num_bytes} bytes, the teacher's budget is {self._device.budget_bytes}: "
                "raise context_budget_bytes or shorten the document"
            )

    def _leave_device(self, key: Key, kv_L2GPD: Tensor) -> None:
        self._host.keep(key, kv_L2GPD)
        if self._disk is not None:
            # Its memory is not free before that.
            self._disk.wait(key)


def _absent(key: Key) -> ContextNotFound:
    metrics.CONTEXT_REQUESTS.labels("absent").inc()
    return ContextNotFound(f"context {key.digest} is in no tier: put it again")
