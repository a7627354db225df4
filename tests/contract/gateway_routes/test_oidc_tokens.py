"""A gateway that takes tokens of an OIDC issuer beside keys."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.gateway.settings import GatewaySettings
from tests.contract.gateway_routes.site import Guarded, Site
from tests.oidc import AUDIENCE, OidcIssuer
from tests.services import wait_ready


@pytest.fixture(scope="module")
def issuer() -> Iterator[OidcIssuer]:
    running = OidcIssuer()
    yield running
    running.close()


@pytest.fixture(scope="module")
def guarded(site: Site, issuer: OidcIssuer) -> Iterator[Guarded]:
    options = ("--api-keys", "--oidc.issuer", issuer.url, "--oidc.audience", AUDIENCE)
    gateway = site.stack.gateway([site.rollout], *options)
    wait_ready(gateway)
    yield Guarded(site.stack, gateway)
    gateway.stop()


def test_tokens_and_keys_are_answered_alike(guarded: Guarded, issuer: OidcIssuer) -> None:
    for name in ("acme/of-a-token", "globex/of-a-token"):
        guarded.stack.publish(name, guarded.stack.cartridge(3))
    _, key = guarded.key("query", tenant="acme")
    for shown in (key, issuer.token()):
        found = guarded.http("GET", "/v1/cartridges", shown).json()["data"]
        assert "acme/of-a-token" in [each["name"] for each in found]
        assert guarded.http("GET", "/v1/cartridges/of-a-token", shown).json()["name"] == "acme/of-a-token"
        assert guarded.http("GET", "/v1/cartridges/globex/of-a-token", shown).status_code == 404
        assert guarded.http("GET", "/v1/runs", shown).status_code == 403
    assert guarded.http("GET", "/v1/runs", issuer.token(scope="foundry:train")).status_code == 200


def test_what_is_no_good_token_is_refused_and_not_repeated(guarded: Guarded, issuer: OidcIssuer) -> None:
    for status, token in (
        (401, issuer.token(aud="others")),
        (401, issuer.token(kid="unknown")),
        (401, "no-token-and-no-key"),
        (401, f"fdy_{'a' * 12}_{'a' * 43}"),
        (403, issuer.token(tenant=None)),
        (403, issuer.token(scope="openid")),
    ):
        answer = guarded.http("GET", "/v1/models", token)
        assert answer.status_code == status
        assert answer.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
        for said in (answer.text, guarded.gateway.log.read_text()):
            assert token.rpartition(".")[2] not in said


def test_tokens_are_taken_only_where_keys_are_asked_for() -> None:
    store = {"redis_url": "redis://h", "objects_url": "file:///x"}
    oidc = {"issuer": "https://issuer.example", "audience": AUDIENCE}
    with pytest.raises(ValueError, match="oidc is for api_keys"):
        GatewaySettings.model_validate({"oidc": oidc, "store": store})
