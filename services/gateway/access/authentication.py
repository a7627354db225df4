"""Who shows which key, or whose token."""

from __future__ import annotations

import hmac
import re
from dataclasses import replace
from datetime import UTC, datetime

from foundry.errors import InvalidArgument, Unauthenticated
from foundry.identity import content_digest
from foundry.store.key_store import KeyText
from foundry.store.objects.layout import KEY_ID
from services.gateway.access.grants import Grants
from services.gateway.access.keys import Keys
from services.gateway.access.oidc import Oidc
from services.gateway.access.principal import Principal

# What an unknown id is compared with, so that the time taken does not tell it from a wrong secret.
_NOBODYS = content_digest(b"")


class Authentication:
    def __init__(self, keys: Keys, admin: KeyText | None, grants: Grants, oidc: Oidc | None = None) -> None:
        """`admin` is the operator's own key, which the store does not know: it may do everything to the names without
        a tenant. `oidc` judges what is no key."""
        self._keys = keys
        self._admin = admin
        self._grants = grants
        self._oidc = oidc

    async def principal_of(self, authorization: str) -> Principal:
        """Who sends this header ("": none). Raises Unauthenticated, PermissionDenied, Unavailable; none repeats what
        was sent."""
        principal = await self._shown(authorization)
        return replace(principal, granted=self._grants.of(principal.tenant))

    def granted(self, tenant: str) -> frozenset[str]:
        """Other tenants' cartridges that this one may query now."""
        return self._grants.of(tenant)

    async def is_gone(self, client: str) -> bool:
        """Whether this is a key that has been revoked, or whose time is over. Of tokens nobody can know that."""
        if not re.fullmatch(KEY_ID, client) or (self._admin is not None and client == self._admin.key_id):
            return False
        key = await self._keys.find(client)
        return key is None or bool(key.ended(datetime.now(UTC)))

    async def _shown(self, authorization: str) -> Principal:
        scheme, _, text = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthenticated("the request has no API key: send one as 'Authorization: Bearer fdy_…'")
        if self._oidc is not None and not text.strip().startswith("fdy_"):
            return await self._oidc.principal_of(text.strip())
        try:
            given = KeyText.parse(text.strip())
        except InvalidArgument as error:
            raise Unauthenticated(error.message) from error
        if self._admin is not None and given.key_id == self._admin.key_id:
            if _same(given, self._admin.secret_digest):
                return Principal(client=given.key_id, tenant="")
            raise _unknown()
        key = await self._keys.find(given.key_id)
        if not _same(given, _NOBODYS if key is None else key.secret_digest) or key is None:
            raise _unknown()
        if ended := key.ended(datetime.now(UTC)):
            raise Unauthenticated(f"the API key {key.key_id} {ended}")
        return Principal(client=key.key_id, tenant=key.tenant, scopes=frozenset(key.scopes), limits=key.limits)


def _same(given: KeyText, secret_digest: str) -> bool:
    return hmac.compare_digest(given.secret_digest, secret_digest)


def _unknown() -> Unauthenticated:
    return Unauthenticated("the API key is none of this gateway's")
