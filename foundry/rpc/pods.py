"""The servers of one service, each with a channel: those that are there now, and which of them is whose."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import grpc
from blake3 import blake3

from foundry.errors import Cancelled, Unavailable
from foundry.rpc.channel import open_channel, typed_errors
from foundry.rpc.resolve import Endpoint, EndpointResolver, Lookup
from foundry.rpc.tls import Tls

# By then a name server has forgotten a pod that ended, or the pod is back.
_SILENT_SECONDS = 10.0


class Pod:
    """One server and the channel to it. `name` is what messages call it."""

    def __init__(self, service: str, endpoint: Endpoint, tls: Tls | None = None, *, token: str | None = None) -> None:
        self.endpoint = endpoint
        self.address = endpoint.address
        self.name = f"{service} {endpoint.address}"
        self.in_flight = 0
        # When it last could not be reached, in `time.monotonic()`.
        self.silent_since = float("-inf")
        self._tls = tls
        self._token = token
        self._open()

    @contextmanager
    def calling(self) -> Iterator[grpc.aio.Channel]:
        """The channel for one call, whose failure raises the FoundryError that the server meant."""
        self.in_flight += 1
        try:
            with typed_errors(self.name):
                yield self._channel
        except (Unavailable, Cancelled) as error:
            # Its store being away says nothing about the server itself; Cancelled is what one that ends says.
            if type(error) in (Unavailable, Cancelled):
                self.silent_since = time.monotonic()
            raise
        finally:
            self.in_flight -= 1

    async def renew(self) -> None:
        """A channel connects again with the certificate it was opened with: open it anew once that was renewed.

        While calls are in flight its connection lives, and needs no certificate.
        """
        if self._tls is not None and self.in_flight == 0 and self._tls.current() != self._credentials:
            outdated = self._channel
            self._open()
            await outdated.close()

    async def close(self) -> None:
        await self._channel.close()

    def _open(self) -> None:
        self._credentials = self._tls.current() if self._tls is not None else None
        self._channel = open_channel(
            self.address, self._credentials, server_name=self.endpoint.server_name, token=self._token
        )


class Pods:
    """The servers behind configured addresses, looked up anew each time: a name stands for all that it has then."""

    def __init__(
        self,
        service: str,
        addresses: Sequence[str],
        tls: Tls | None = None,
        *,
        token: str | None = None,
        lookup: Lookup | None = None,
        silent_seconds: float = _SILENT_SECONDS,
    ) -> None:
        """`service` is its name in messages, `token` is shown to its servers; `lookup` is asked instead of the
        system's. Raises InvalidArgument."""
        self.addresses = addresses
        self._service = service
        self._tls = tls
        self._token = token
        self._resolver = EndpointResolver(addresses, lookup)
        self._silent_seconds = silent_seconds
        self._pods: dict[str, Pod] = {}
        self._leaving: list[Pod] = []

    async def look(self) -> list[Pod]:
        """All that are there now, in the order of the addresses; a pod stays the same object while it is there."""
        endpoints = await self._resolver.endpoints()
        before = self._pods
        self._pods = {
            each.address: before.get(each.address) or Pod(self._service, each, self._tls, token=self._token)
            for each in endpoints
        }
        leaving = [*self._leaving, *(pod for address, pod in before.items() if address not in self._pods)]
        # What is still answered by one that left the name, it may end.
        self._leaving = [pod for pod in leaving if pod.in_flight]
        present = list(self._pods.values())
        await asyncio.gather(*(pod.close() for pod in leaving if not pod.in_flight), *(pod.renew() for pod in present))
        return present

    async def reachable(self) -> list[Pod]:
        """Those to ask: without the ones that lately were silent, as long as others behind a name may take their place.

        A server whose address was given as a number is waited for. Raises Unavailable while no name resolves.
        """
        present = await self.look()
        if not present:
            raise Unavailable(f"no {self._service} server is behind {', '.join(self.addresses)}")
        since = time.monotonic() - self._silent_seconds
        return [pod for pod in present if pod.silent_since < since or not pod.endpoint.named] or present

    async def close(self) -> None:
        await asyncio.gather(*(pod.close() for pod in (*self._pods.values(), *self._leaving)))


def rendezvous(key: str, address: str) -> bytes:
    """The pod where this is highest has the key; when it goes, the next has, and no other key moves."""
    return blake3(f"{key} {address}".encode()).digest()
