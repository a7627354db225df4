"""The keys that an OIDC issuer signs its tokens with, as it publishes them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx
import structlog
from jwt import PyJWK, PyJWKSet, PyJWTError

from foundry.errors import InvalidArgument, Unavailable
from foundry.rpc.resolve import is_loopback
from foundry.untrusted import parse_object

log = structlog.get_logger(__name__)

_DISCOVERY = "/.well-known/openid-configuration"
# Between two looks: a key that the issuer withdraws is taken for as long.
_REFRESH_SECONDS = 300.0
# Of one look, discovery and keys.
_DEADLINE_SECONDS = 10.0
# Whoever sends tokens with unknown keys costs the issuer no more than one look in this time.
_MIN_SECONDS = 10.0
_MAX_BYTES = 2**20
# What httpx and PyJWT raise at answers that are late, or no keys.
_FAULTS = (
    *(httpx.HTTPError, httpx.InvalidURL, TimeoutError, InvalidArgument),
    *(PyJWTError, LookupError, TypeError, ValueError, AttributeError),
)


class Issuer:
    """While the issuer is away, the last known keys stand."""

    def __init__(self, name: str, jwks_url: str | None, *, min_seconds: float = _MIN_SECONDS) -> None:
        """`name` is its URL. Without `jwks_url` its discovery document says where the keys are."""
        self.name = name
        self._jwks_url = jwks_url
        self._min_seconds = min_seconds
        # Made once: it reads all certificates of authorities.
        self._tls = httpx.create_ssl_context()
        self._keys: Mapping[str, PyJWK] = {}
        self._looking = asyncio.Lock()
        # When the last look began, in `time.monotonic()`.
        self._looked_at = -math.inf
        self._failed = True

    async def watch(self) -> None:
        """Look at the keys now and then, until cancelled."""
        while True:
            await self._look()
            await asyncio.sleep(_REFRESH_SECONDS)

    async def find(self, key_id: str) -> PyJWK | None:
        """None if the issuer has no such key. Raises Unavailable if that can't be known now."""
        if key_id not in self._keys:
            await self._look()
            if key_id not in self._keys and self._failed:
                raise Unavailable(
                    "the keys of the tokens' issuer can't be read now: the gateway's log says why",
                    retry_after_seconds=self._min_seconds,
                )
        return self._keys.get(key_id)

    async def _look(self) -> None:
        """At most once in `min_seconds`, for all who ask in that time."""
        async with self._looking:
            if time.monotonic() < self._looked_at + self._min_seconds:
                return
            self._looked_at, self._failed = time.monotonic(), True
            try:
                async with asyncio.timeout(_DEADLINE_SECONDS), self._client() as client:
                    self._keys = await self._published(client)
                self._failed = False
            except _FAULTS as error:
                log.warning("issuer's keys not read: the last known ones stand", issuer=self.name, error=repr(error))

    def _client(self) -> httpx.AsyncClient:
        # A proxy of the environment leads out, never to this machine.
        return httpx.AsyncClient(verify=self._tls, trust_env=not is_loopback(urlsplit(self.name).hostname or ""))

    async def _published(self, client: httpx.AsyncClient) -> dict[str, PyJWK]:
        url = self._jwks_url or await self._discovered(client)
        return {key.key_id: key for key in PyJWKSet.from_dict(await _json(client, url)) if key.key_id is not None}

    async def _discovered(self, client: httpx.AsyncClient) -> str:
        """OpenID Connect Discovery 1.0, section 4."""
        found = await _json(client, self.name.rstrip("/") + _DISCOVERY)
        if found["issuer"] != self.name:
            raise InvalidArgument(f"the discovery document is of the issuer {str(found['issuer'])[:200]!r}")
        return check_url(found["jwks_uri"])


async def _json(client: httpx.AsyncClient, url: str) -> dict[str, Any]:
    content = b""
    async with client.stream("GET", url) as response:
        if response.status_code != httpx.codes.OK:
            raise InvalidArgument(f"{url} answered {response.status_code}")
        async for part in response.aiter_bytes():
            content += part
            if len(content) > _MAX_BYTES:
                raise InvalidArgument(f"{url} answered more than {_MAX_BYTES} bytes")
    return parse_object(content)


def check_url(url: str) -> str:
    """Raises ValueError unless nobody on the way can exchange what is read from there."""
    parts = urlsplit(url)
    if parts.hostname and (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname))):
        return url
    raise ValueError("expected a URL that begins with https://, or with http:// on this machine")
