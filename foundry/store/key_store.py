"""API keys as they are kept: who has which, never the secret itself."""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Annotated

from pydantic import AfterValidator, Field

from foundry.errors import ApiKeyNotFound, Conflict, DigestMismatch, InvalidArgument, NotFound
from foundry.identity import content_digest
from foundry.store.api_keys import KeyLimits, Scope
from foundry.store.objects import layout
from foundry.store.objects.known import Known, refreshed
from foundry.store.objects.objects import Objects
from foundry.store.paging import Page, cut
from foundry.store.sealed import seal, unseal
from foundry.store.spec import Digest
from foundry.tenants import check_tenant
from foundry.validation import Checked, FirstError, Time, checked

# Lower-case base32: no letter that reads like a digit.
_ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
_KEY = re.compile(rf"fdy_(?P<id>{layout.KEY_ID})_(?P<secret>[A-Za-z0-9_-]{{32,128}})")


@dataclass(frozen=True, slots=True)
class KeyText:
    """What a client shows. `secret_digest` is all that is kept of its secret, which is random and long: nobody who has
    the digest finds it."""

    key_id: str
    secret_digest: str

    @classmethod
    def parse(cls, text: str) -> KeyText:
        """Raises InvalidArgument, which does not say what was given."""
        if (match := _KEY.fullmatch(text)) is None:
            raise InvalidArgument("that is not an API key: those are written fdy_ID_SECRET", field="authorization")
        return cls(match["id"], content_digest(match["secret"].encode()))


def _each_once(scopes: tuple[Scope, ...]) -> tuple[Scope, ...]:
    if len(set(scopes)) < len(scopes):
        raise ValueError(f"{', '.join(scopes)}: name each once")
    return scopes


# JSON has no tuples.
Scopes = Annotated[
    tuple[Scope, ...], FirstError(), AfterValidator(_each_once), Field(min_length=1, strict=False, max_length=8)
]


class ApiKey(Checked):
    """A key without its secret. Times are RFC 3339, UTC."""

    key_id: str = Field(pattern=rf"\A{layout.KEY_ID}\z")
    tenant: Annotated[str, checked(check_tenant)]
    label: str = Field(max_length=200)
    scopes: Scopes
    secret_digest: Digest
    created_at: Time
    expires_at: Time | None
    revoked_at: Time | None
    limits: KeyLimits

    def ended(self, now: datetime) -> str:
        """Why the key is not taken at `now`; "" if it is."""
        if self.revoked_at is not None:
            return f"was revoked at {self.revoked_at}"
        if self.expires_at is not None and datetime.fromisoformat(self.expires_at) <= now:
            return f"expired at {self.expires_at}"
        return ""


class KeyStore:
    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    async def create(
        self,
        *,
        tenant: str = "",
        label: str = "",
        scopes: Iterable[Scope],
        expires_at: datetime | None = None,
        limits: KeyLimits | None = None,
    ) -> tuple[ApiKey, str]:
        """Make a key: its record, and its text, which can't be had again. Raises InvalidArgument."""
        key_id, secret = "".join(secrets.choice(_ID_ALPHABET) for _ in range(12)), secrets.token_urlsafe(32)
        key = ApiKey(
            key_id=key_id,
            tenant=tenant,
            label=label,
            scopes=tuple(scopes),
            secret_digest=content_digest(secret.encode()),
            created_at=_time(datetime.now(UTC)),
            expires_at=None if expires_at is None else _time(expires_at),
            revoked_at=None,
            limits=limits or KeyLimits(),
        )
        if not await self._objects.put_if_absent(layout.api_key(key_id), _content(key)):
            raise Conflict(f"there is a key {key_id} already: make another one")
        return key, f"fdy_{key_id}_{secret}"

    async def get(self, key_id: str) -> ApiKey:
        """Raises ApiKeyNotFound, DigestMismatch if the record is damaged: then the key is refused everywhere."""
        try:
            record = layout.api_key(key_id)
            return await self._objects.record(record, partial(_parse, record))
        except NotFound as error:
            raise ApiKeyNotFound(f"there is no key {key_id}", field="key_id") from error

    async def revoke(self, key_id: str) -> None:
        """Gateways refuse the key within their `api_keys_refresh_seconds`. Revoked keys stay listed.

        A damaged record, which no longer says whose it was, is deleted. Raises ApiKeyNotFound.
        """
        try:
            key = await self.get(key_id)
        except DigestMismatch:
            await self._objects.delete(layout.api_key(key_id))
            return
        if key.revoked_at is None:
            revoked = key.model_copy(update={"revoked_at": _time(datetime.now(UTC))})
            await self._objects.put(layout.api_key(key_id), [_content(revoked)])

    async def refreshed(self, known: Mapping[str, Known[ApiKey]]) -> dict[str, Known[ApiKey]]:
        """All keys by record. Read are only those that changed since `known`."""
        return await refreshed(self._objects, "api_key", layout.API_KEYS, layout.API_KEY, _parse, known)

    async def _read(self, key_ids: Iterable[str]) -> dict[str, ApiKey]:
        found = await self._objects.records("api_key", map(layout.api_key, key_ids), _parse)
        return {key.key_id: key for key in found.values()}

    # Last, because after it `list` means this method.
    async def list(self) -> list[ApiKey]:
        """All keys whose record is whole, by id."""
        return (await self.page(limit=sys.maxsize)).items

    async def page(self, *, after: str = "", limit: int) -> Page[ApiKey]:
        """Some of them, behind the id `after`. Raises InvalidArgument."""
        keys = await self._objects.keys_here(layout.API_KEYS)
        some, next_after = cut([match["id"] for key in keys if (match := layout.API_KEY.fullmatch(key))], after, limit)
        return Page([*(await self._read(some)).values()], next_after)


def _parse(record: str, content: bytes) -> ApiKey:
    key = ApiKey.model_validate(unseal(content))
    if layout.api_key(key.key_id) != record:
        raise InvalidArgument(f"it is the record of {key.key_id}")
    return key


def _content(key: ApiKey) -> bytes:
    return seal(key.model_dump(mode="json")).encode()


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")
