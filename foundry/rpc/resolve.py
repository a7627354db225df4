"""Who is behind the configured addresses now: a name with several addresses (a headless Service) is several pods."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from foundry.errors import InvalidArgument

log = structlog.get_logger(__name__)

_TIMEOUT_SECONDS = 5.0

# The IP addresses of a host name; raises OSError where there are none.
Lookup = Callable[[str], Awaitable[Sequence[str]]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server."""

    # host:port, the host always a number.
    address: str
    # The host as it was configured: the name that the server's certificate must carry.
    server_name: str

    @property
    def named(self) -> bool:
        """Whether a name stands for it, behind which others may take its place."""
        return not _is_number(self.server_name)


class EndpointResolver:
    """Looks the configured addresses up; a name that can't be looked up keeps the endpoints that it had."""

    def __init__(self, addresses: Sequence[str], lookup: Lookup | None = None) -> None:
        """`lookup` instead of the system's. Raises InvalidArgument for what is not host:port."""
        self._targets = [_split(address) for address in addresses]
        self._lookup = lookup or system_lookup
        self._last: dict[str, list[str]] = {}

    async def endpoints(self) -> list[Endpoint]:
        """In the order of the configured addresses, those of one name by number."""
        hosts = dict.fromkeys(host for host, _ in self._targets)
        numbers = dict(zip(hosts, await asyncio.gather(*map(self._numbers, hosts)), strict=True))
        found: dict[str, Endpoint] = {}
        for host, port in self._targets:
            for number in numbers[host]:
                address = f"[{number}]:{port}" if ":" in number else f"{number}:{port}"
                found.setdefault(address, Endpoint(address, host))
        return list(found.values())

    async def _numbers(self, host: str) -> list[str]:
        if _is_number(host):
            return [host]
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                self._last[host] = sorted(await self._lookup(host))
        except OSError as error:
            # A name server that hiccups does not take working servers away.
            log.warning("address does not resolve", host=host, error=str(error) or "no answer in time")
        return self._last.get(host, [])


def host_of(address: str) -> str:
    """The host of host:port, an IPv6 number without its brackets. Raises InvalidArgument."""
    return _split(address)[0]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`, a name or a number without brackets."""
    return ipaddress.ip_address(host).is_loopback if _is_number(host) else host == "localhost"


async def system_lookup(host: str) -> Sequence[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    numbers = {family: {str(where[0]) for each, _, _, _, where in found if each == family} for family, *_ in found}
    # A pod of a dual-stack cluster has an address of each family, and would stand here twice.
    return list(numbers.get(socket.AF_INET) or numbers.get(socket.AF_INET6) or ())


def _split(address: str) -> tuple[str, str]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidArgument(f"{address!r} is not host:port")
    return host.strip("[]"), port


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
