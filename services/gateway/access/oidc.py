"""Who asks with a token of an OIDC issuer: a JWT, whose claims say what a key's record says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, get_args

import jwt

from foundry.errors import InvalidArgument, PermissionDenied, Unauthenticated
from foundry.store.api_keys import Scope
from foundry.tenants import check_tenant
from services.gateway.access.issuer import Issuer
from services.gateway.access.principal import Principal
from services.gateway.settings import OidcSettings

# Signed with a private key, all of them: who knows what the issuer publishes can't make a token.
_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
_MAX_TOKEN_CHARACTERS = 16384
# OpenID Connect Core 1.0, section 2.
_SUBJECT = re.compile(r"[ -~]{1,255}")
# None of these repeats what a token says.
_REASONS: tuple[tuple[type[jwt.PyJWTError], str], ...] = (
    (jwt.ExpiredSignatureError, "it has expired"),
    (jwt.ImmatureSignatureError, "it is not valid yet"),
    (jwt.InvalidAudienceError, "it is for somebody else: its claim 'aud' does not name this gateway"),
    (jwt.InvalidIssuerError, "it comes from another issuer"),
    (jwt.MissingRequiredClaimError, "it must have the claims exp, iss, aud and sub"),
    (jwt.InvalidAlgorithmError, "it is signed by an algorithm that is not its key's"),
    (jwt.InvalidSignatureError, "its signature is wrong"),
)


class Oidc:
    def __init__(self, settings: OidcSettings, issuer: Issuer) -> None:
        self._settings = settings
        self._issuer = issuer

    async def principal_of(self, token: str) -> Principal:
        """Raises Unauthenticated; PermissionDenied for a token that is good and says no tenant or scope; Unavailable.
        None repeats the token."""
        claims = await self._claims(token)
        if not _SUBJECT.fullmatch(claims["sub"]):
            raise Unauthenticated("the token's claim 'sub' must have 1 to 255 printable ASCII characters")
        return Principal(client=f"oidc:{claims['sub']}", tenant=self._tenant(claims), scopes=self._scopes(claims))

    async def _claims(self, token: str) -> Mapping[str, Any]:
        if len(token) > _MAX_TOKEN_CHARACTERS:
            raise Unauthenticated(f"the token has more than {_MAX_TOKEN_CHARACTERS} characters")
        try:
            key_id = jwt.get_unverified_header(token).get("kid")
            if key_id is None or (key := await self._issuer.find(key_id)) is None:
                raise Unauthenticated("the token is signed with no key of its issuer's ('kid')")
            claims: Mapping[str, Any] = jwt.decode(
                token,
                key,
                algorithms=_ALGORITHMS,
                issuer=self._issuer.name,
                audience=self._settings.audience,
                leeway=self._settings.leeway_seconds,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.PyJWTError as error:
            reason = next((reason for kind, reason in _REASONS if isinstance(error, kind)), "it is malformed")
            raise Unauthenticated(f"the token is not taken: {reason}") from error
        return claims

    def _tenant(self, claims: Mapping[str, Any]) -> str:
        claim = self._settings.tenant_claim
        if not claim:
            return ""
        tenant = claims.get(claim)
        with suppress(InvalidArgument):
            if isinstance(tenant, str) and tenant:
                return check_tenant(tenant)
        raise PermissionDenied(
            f"the token's claim {claim!r} must name a tenant: lower-case letters, digits and '._-', starting with a "
            "letter or digit, at most 63 characters"
        )

    def _scopes(self, claims: Mapping[str, Any]) -> frozenset[Scope]:
        claim, prefix = self._settings.scopes_claim, self._settings.scope_prefix
        given = claims.get(claim)
        # As OAuth 2.0 writes them (RFC 6749, section 3.3), or as a list.
        words = given.split(" ") if isinstance(given, str) else given if isinstance(given, list) else []
        scopes = frozenset(scope for scope in get_args(Scope) if prefix + scope in words)
        if not scopes:
            wanted = ", ".join(prefix + scope for scope in get_args(Scope))
            raise PermissionDenied(f"the token's claim {claim!r} must name one of {wanted}")
        return scopes
