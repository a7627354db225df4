"""What the routes share: settings, store, rollout servers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from foundry.errors import ResourceExhausted, Unavailable
from foundry.rpc.pods import Pods
from foundry.store import CartridgeStore
from services.gateway import metrics
from services.gateway.access.authentication import Authentication
from services.gateway.access.quotas import Quotas
from services.gateway.access.rates import Rates
from services.gateway.balancer import RolloutBalancer
from services.gateway.base_name import BaseName
from services.gateway.conversion.converter import Converter
from services.gateway.openai.tokens import TokenSpelling
from services.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    # Not imported where there are no Jobs: the Kubernetes client is large.
    from services.gateway.kubernetes.jobs import Jobs


@dataclass
class Gateway:
    settings: GatewaySettings
    store: CartridgeStore
    rollouts: RolloutBalancer
    base_name: BaseName
    teachers: Pods | None
    spelling: TokenSpelling
    converter: Converter
    rates: Rates
    quotas: Quotas
    # None: runs are trained by workers that take them from the queue.
    jobs: Jobs | None = None
    # None: everybody may do everything.
    authentication: Authentication | None = None
    num_in_flight: int = 0
    transfer_bytes: int = 0
    # Files of batches are held in memory while they are put.
    uploading: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(4))
    # Set when there is a batch to be answered.
    batch_created: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """One completion request in flight. Raises ResourceExhausted if there are too many."""
        if self.num_in_flight >= self.settings.max_concurrent_requests:
            raise ResourceExhausted(f"{self.num_in_flight} requests are being answered", retry_after_seconds=1.0)
        self.num_in_flight += 1
        metrics.IN_FLIGHT.set(self.num_in_flight)
        try:
            yield
        finally:
            self.num_in_flight -= 1
            metrics.IN_FLIGHT.set(self.num_in_flight)

    @contextmanager
    def transferring(self, num_bytes: int) -> Iterator[None]:
        """A file held in memory while it is sent or taken. Raises ResourceExhausted if there is no room for it."""
        most = self.settings.transfer_memory_bytes
        if num_bytes > most:
            raise ResourceExhausted(f"the file has {num_bytes} bytes, this gateway moves none of more than {most}")
        if self.transfer_bytes + num_bytes > most:
            raise ResourceExhausted(
                f"files of {self.transfer_bytes} bytes are on their way, {num_bytes} more are beyond {most}",
                retry_after_seconds=1.0,
            )
        self.transfer_bytes += num_bytes
        try:
            yield
        finally:
            self.transfer_bytes -= num_bytes

    async def check_rollouts(self) -> None:
        """Raises Unavailable if no rollout server answers now, FingerprintMismatch if they serve different models."""
        model = self.rollouts.model()
        if self.rollouts.num_reachable() == 0:
            raise Unavailable(f"no rollout server of {model.name} answers any more")


async def _of_request(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


GatewayDep = Annotated[Gateway, Depends(_of_request)]
