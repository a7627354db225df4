"""Tokens of an OIDC issuer: whose they are, and which are refused."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import ValidationError

from foundry.errors import FoundryError, PermissionDenied, Unauthenticated, Unavailable
from services.gateway.access.issuer import Issuer
from services.gateway.access.oidc import Oidc
from services.gateway.access.principal import Principal
from services.gateway.settings import OidcSettings
from tests.oidc import AUDIENCE, OidcIssuer


@pytest.fixture
def issuer() -> Iterator[OidcIssuer]:
    running = OidcIssuer()
    yield running
    running.close()


@pytest.fixture
def keys(issuer: OidcIssuer) -> Issuer:
    """They look as often as they are asked."""
    return Issuer(issuer.url, None, min_seconds=0)


@pytest.fixture
def oidc(issuer: OidcIssuer, keys: Issuer) -> Oidc:
    return Oidc(settings(issuer), keys)


def settings(issuer: OidcIssuer, **changes: Any) -> OidcSettings:
    return OidcSettings(issuer=issuer.url, audience=AUDIENCE, **changes)


@pytest.mark.parametrize("key", ["rsa", "ec", "ed"])
async def test_a_good_token_says_who_asks(issuer: OidcIssuer, oidc: Oidc, key: str) -> None:
    asks = await oidc.principal_of(issuer.token(key=key))
    assert asks == Principal(client="oidc:somebody", tenant="acme", scopes=frozenset({"query"}))


@pytest.mark.parametrize(
    ("names", "claims"),
    [
        ({}, {"scope": ["foundry:query", "foundry:admin", 1, {}]}),
        (
            {"scopes_claim": "roles", "tenant_claim": "https://x/org"},
            {"roles": "query-all foundry:admin foundry:query"},
        ),
        ({"scope_prefix": "", "tenant_claim": ""}, {"scope": "query admin", "tenant": None}),
    ],
)
async def test_claims_are_where_the_settings_say(
    issuer: OidcIssuer, keys: Issuer, names: dict[str, str], claims: dict[str, Any]
) -> None:
    asks = await Oidc(settings(issuer, **names), keys).principal_of(
        issuer.token(**{"https://x/org": "acme", "aud": ["others", AUDIENCE]} | claims)
    )
    assert asks.scopes == {"query", "admin"}
    assert asks.tenant == ("acme" if names.get("tenant_claim", "x") else "")


NOW = int(time.time())
TIMES: list[Any] = ["soon", [1], {}, float("inf"), float("nan"), -(10**30)]
ODD: list[Any] = [None, "", "a/b", "Acme", "../x", 7, True, ["acme"], {"acme": 1}, "x" * 64]


@pytest.mark.parametrize(
    ("error", "claims"),
    [
        (Unauthenticated, {"exp": NOW - 3600}),
        (Unauthenticated, {"exp": None}),
        *((Unauthenticated, {"exp": odd}) for odd in TIMES),
        (Unauthenticated, {"nbf": NOW + 3600}),
        (Unauthenticated, {"iat": NOW + 3600}),
        (Unauthenticated, {"aud": "others"}),
        (Unauthenticated, {"aud": None}),
        (Unauthenticated, {"aud": [AUDIENCE, 1]}),
        (Unauthenticated, {"iss": "https://evil.example"}),
        (Unauthenticated, {"iss": None}),
        (Unauthenticated, {"sub": None}),
        (Unauthenticated, {"sub": ""}),
        (Unauthenticated, {"sub": "é"}),
        (Unauthenticated, {"sub": "a\nb"}),
        (Unauthenticated, {"sub": "x" * 256}),
        *((PermissionDenied, {"tenant": odd}) for odd in ODD),
        *((PermissionDenied, {"scope": odd}) for odd in (*ODD, "query", "foundry:root", [["foundry:query"]])),
    ],
)
async def test_what_a_token_must_say(
    issuer: OidcIssuer, oidc: Oidc, error: type[FoundryError], claims: dict[str, Any]
) -> None:
    token = _signed(issuer, claims)
    with pytest.raises(error) as caught:
        await oidc.principal_of(token)
    _not_echoed(token, caught.value)


def _signed(issuer: OidcIssuer, claims: dict[str, Any]) -> str:
    """PyJWT signs no claims that are none."""
    good = jwt.decode(issuer.token(), options={"verify_signature": False})
    content = {name: value for name, value in (good | claims).items() if value is not None}
    return jwt.PyJWS().encode(json.dumps(content).encode(), issuer.private_keys["rsa"], "RS256", headers={"kid": "rsa"})


def _not_echoed(token: str, error: FoundryError) -> None:
    assert not any(part in error.message for part in token.split(".") if len(part) > 5)


async def test_clocks_may_differ_a_little(issuer: OidcIssuer, keys: Issuer) -> None:
    token = issuer.token(exp=int(time.time()) - 60)
    await Oidc(settings(issuer, leeway_seconds=600), keys).principal_of(token)
    with pytest.raises(Unauthenticated, match="expired"):
        await Oidc(settings(issuer, leeway_seconds=0), keys).principal_of(token)


def _forged(issuer: OidcIssuer, header: dict[str, Any], secret: bytes) -> str:
    """A good token with another header, signed with what everybody knows."""
    head = base64.urlsafe_b64encode(json.dumps(header).encode()).rstrip(b"=")
    content = head + b"." + issuer.token().split(".")[1].encode()
    signature = hmac.digest(secret, content, hashlib.sha256) if secret else b""
    return (content + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


@pytest.mark.parametrize("alg", ["none", "None", "HS256", "RS256", "PS256", "ES256", 7, None])
@pytest.mark.parametrize("kid", ["rsa", "ec"])
async def test_what_is_signed_by_others_is_refused(issuer: OidcIssuer, oidc: Oidc, alg: Any, kid: str) -> None:
    public = issuer.private_keys[kid].public_key()
    for encoding, form in ((Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), (Encoding.DER, PublicFormat.PKCS1)):
        if kid == "rsa" or encoding is Encoding.PEM:
            token = _forged(issuer, {"alg": alg, "kid": kid}, public.public_bytes(encoding, form))
            with pytest.raises(Unauthenticated):
                await oidc.principal_of(token)
    with pytest.raises(Unauthenticated):
        await oidc.principal_of(_forged(issuer, {"alg": alg, "kid": kid}, b""))


async def test_a_key_that_is_no_public_one_is_not_used(issuer: OidcIssuer, oidc: Oidc) -> None:
    secret = b"s" * 32
    octets = {"kty": "oct", "alg": "HS256", "kid": "s", "k": base64.urlsafe_b64encode(secret).decode().rstrip("=")}
    issuer.answers["/keys"] = json.dumps({"keys": [octets]}).encode()
    with pytest.raises(Unauthenticated, match="algorithm"):
        await oidc.principal_of(_forged(issuer, {"alg": "HS256", "kid": "s"}, secret))


HEADERS = [{"alg": "RS256"}, {"alg": "RS256", "kid": 7}, {"alg": "RS256", "kid": "rsa", "crit": ["x"]}]


@pytest.mark.parametrize(
    "token",
    [
        *("", ".", "..", "a.b.c", "é.é.é", "fdy_x", "x" * 100_000, "." * 16_000),
        *(base64.urlsafe_b64encode(b"[" * 12_000).decode().rstrip("=") + "." + end for end in ("e30.", "", "..")),
        *(base64.urlsafe_b64encode(json.dumps(head).encode()).decode().rstrip("=") + ".e30.AA" for head in HEADERS),
    ],
)
async def test_what_is_no_token_is_refused(issuer: OidcIssuer, oidc: Oidc, token: str) -> None:
    with pytest.raises(Unauthenticated) as caught:
        await oidc.principal_of(token)
    _not_echoed(token, caught.value)


async def test_a_changed_claim_is_found_out(issuer: OidcIssuer, oidc: Oidc) -> None:
    head, _, signature = issuer.token().split(".")
    with pytest.raises(Unauthenticated, match="signature"):
        await oidc.principal_of(".".join((head, issuer.token(tenant="other").split(".")[1], signature)))


async def test_keys_change_while_the_gateway_runs(issuer: OidcIssuer, oidc: Oidc) -> None:
    await oidc.principal_of(issuer.token())
    issuer.private_keys["ec-2"] = issuer.private_keys["ec"]
    await oidc.principal_of(issuer.token(key="ec", kid="ec-2"))
    del issuer.private_keys["ed"]
    with pytest.raises(Unauthenticated, match="no key of its issuer"):
        await oidc.principal_of(issuer.token(kid="never"))
    assert issuer.num_looks == 3


async def test_unknown_keys_cost_the_issuer_one_look(issuer: OidcIssuer) -> None:
    keys = Issuer(issuer.url, f"{issuer.url}/keys", min_seconds=3600)
    oidc = Oidc(settings(issuer), keys)
    for number in range(20):
        with pytest.raises(Unauthenticated):
            await oidc.principal_of(issuer.token(kid=f"unknown-{number}"))
    await oidc.principal_of(issuer.token())
    assert issuer.num_looks == 1


async def test_while_the_issuer_is_away_known_keys_stand(issuer: OidcIssuer, oidc: Oidc) -> None:
    await oidc.principal_of(issuer.token())
    issuer.close()
    assert (await oidc.principal_of(issuer.token(key="ec"))).tenant == "acme"
    with pytest.raises(Unavailable):
        await oidc.principal_of(issuer.token(kid="new"))


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/.well-known/openid-configuration", b"not JSON"),
        ("/.well-known/openid-configuration", b"{}"),
        (
            "/.well-known/openid-configuration",
            b'{"issuer": "https://evil.example", "jwks_uri": "https://evil.example"}',
        ),
        ("/.well-known/openid-configuration", b'{"issuer": "ISSUER", "jwks_uri": "file:///etc/passwd"}'),
        ("/.well-known/openid-configuration", b'{"issuer": "ISSUER", "jwks_uri": ["x"]}'),
        ("/.well-known/openid-configuration", b" " * 2**21),
        *(("/keys", answer) for answer in (b"", b"[]", b"{}", b'{"keys": 7}', b'{"keys": [7, {}]}', b"[" * 10**5)),
        ("/keys", b'{"keys": [{"kty": "RSA", "kid": "rsa", "n": 7, "e": 7}]}'),
        ("/keys", b'{"keys": [{"kty": "RSA", "kid": "rsa", "alg": ["RS256"]}]}'),
    ],
)
async def test_odd_answers_of_an_issuer_let_nobody_in(issuer: OidcIssuer, oidc: Oidc, path: str, answer: bytes) -> None:
    issuer.answers[path] = answer.replace(b"ISSUER", issuer.url.encode())
    with pytest.raises(Unavailable):
        await oidc.principal_of(issuer.token())
    issuer.answers.clear()
    await oidc.principal_of(issuer.token())


@pytest.mark.parametrize(
    "url", ["http://issuer.example", "file:///etc/passwd", "issuer.example", "https://", "http://[x"]
)
def test_keys_come_only_from_where_nobody_can_exchange_them(url: str) -> None:
    for values in ({"issuer": url}, {"issuer": "https://issuer.example", "jwks_url": url}):
        with pytest.raises(ValidationError):
            OidcSettings.model_validate({"audience": AUDIENCE, **values})
