"""Who is answered: with which key, and what for."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

import pytest
from fastapi import APIRouter
from fastapi.routing import iter_route_contexts
from typer.testing import CliRunner, Result

from foundry.cli.main import app
from foundry.client import FoundryClient
from foundry.errors import InvalidArgument, PermissionDenied, StoreUnavailable, Unauthenticated
from foundry.identity import content_digest
from foundry.store import ApiKey, CartridgeStore, GrantStore, KeyStore, Objects
from foundry.store.api_keys import Scope
from foundry.store.credentials import S3Access
from foundry.store.key_store import KeyText
from foundry.store.objects.known import Known
from services.gateway.access.authentication import Authentication
from services.gateway.access.grants import Grants
from services.gateway.access.keys import Keys
from services.gateway.access.route import ScopedRoute
from services.gateway.access.scopes import NEEDED, OPEN
from services.gateway.app import build_app
from services.gateway.settings import GatewaySettings
from tests.contract.gateway_routes.site import ADMIN_KEY, DOCUMENT, Guarded, Site
from tests.services import get, wait_ready, wait_until

PAST = datetime.now(UTC) - timedelta(seconds=1)
SCOPES: tuple[Scope, ...] = get_args(Scope)
# What no key is answered with: it would be refused as it stands, if anybody read it.
GARBAGE = {"content": b"{", "headers": {"content-type": "application/json"}}


def routes(guarded: Guarded) -> dict[str, Scope]:
    """`METHOD path` of all that the gateway says it has, parameters filled in, and the scope that each needs."""
    paths = get(guarded.gateway, "/openapi.json").json()["paths"]
    found = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    needed = {re.sub(":path", "", route): scope for route, scope in NEEDED.items()}
    assert {route for route in found if route.split()[1] not in OPEN} == needed.keys()
    return {re.sub(r"{\w+}", "1", route): scope for route, scope in needed.items()}


def _wrong_secret(guarded: Guarded) -> str:
    _, text = guarded.key(*SCOPES)
    return text[:-1] + ("a" if text[-1] != "a" else "b")


REFUSED: Mapping[str, Callable[[Guarded], str | None]] = {
    "no key": lambda guarded: None,
    "no key of ours": lambda guarded: "sk-" + "a" * 48,
    "unknown": lambda guarded: f"fdy_{'a' * 12}_{'a' * 43}",
    "wrong secret": _wrong_secret,
    "wrong secret of the operator's": lambda guarded: ADMIN_KEY[:-1] + "b",
    "expired": lambda guarded: guarded.key(*SCOPES, expires_at=PAST)[1],
    "revoked": lambda guarded: guarded.key(*SCOPES, revoked=True)[1],
}


@pytest.mark.parametrize("why", REFUSED)
def test_no_route_answers_without_a_good_key(guarded: Guarded, why: str) -> None:
    key = REFUSED[why](guarded)
    for route in routes(guarded):
        # The unknown one is looked for in the store each time, at most once a second.
        if why == "unknown" and not route.startswith("GET"):
            continue
        method, path = route.split(" ")
        answer = guarded.http(method, path, key, **(GARBAGE if method in ("POST", "PUT") else {}))
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "UNAUTHENTICATED"), route
        assert answer.headers["www-authenticate"] == "Bearer"
        assert key is None or key not in answer.text


@pytest.mark.parametrize("scope", SCOPES)
def test_a_key_does_what_its_scope_is_for_and_nothing_else(guarded: Guarded, scope: Scope) -> None:
    _, key = guarded.key(scope)
    for route, needed in routes(guarded).items():
        method, path = route.split(" ")
        answer = guarded.http(method, path, key, **(GARBAGE if method in ("POST", "PUT") else {}))
        if scope == needed:
            assert answer.status_code not in (401, 403), route
        else:
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "PERMISSION_DENIED"), route
            assert f"needs the scope {needed}, this key has {scope}" in answer.json()["error"]["message"]


def test_probes_metrics_and_the_documentation_need_no_key(guarded: Guarded) -> None:
    for path in OPEN:
        assert get(guarded.gateway, path).status_code == 200, path


def test_a_route_that_says_no_scope_is_refused() -> None:
    router = APIRouter(route_class=ScopedRoute)
    with pytest.raises(LookupError, match="GET /v1/new"):
        router.get("/v1/new")(lambda: None)


def test_every_route_asks_for_a_key_or_is_open(guarded: Guarded) -> None:
    app = build_app(GatewaySettings(store=guarded.stack.settings))
    without = {
        each.path for each in iter_route_contexts(app.routes) if not isinstance(each.original_route, ScopedRoute)
    }
    # Scripts of the documentation.
    assert without == OPEN | {"/static-offline-docs"}


def test_a_new_key_is_answered_at_once_and_a_revoked_one_soon_no_more(guarded: Guarded) -> None:
    key, text = guarded.key("query")
    assert guarded.http("GET", "/v1/models", text).status_code == 200

    async def revoke(store: CartridgeStore) -> None:
        await store.api_keys.revoke(key.key_id)

    guarded.stack.with_store(revoke)
    wait_until(lambda: guarded.http("GET", "/v1/models", text).status_code == 401, guarded.gateway)
    assert "was revoked at" in guarded.http("GET", "/v1/models", text).json()["error"]["message"]


def test_a_damaged_key_is_not_answered(guarded: Guarded) -> None:
    key, text = guarded.key("query")
    assert guarded.http("GET", "/v1/models", text).status_code == 200
    record = guarded.stack.directory / "objects" / "api-keys" / f"{key.key_id}.json"
    content = record.read_text()
    record.write_text(content.replace('"query"', '"admin"'))
    wait_until(lambda: guarded.http("GET", "/v1/models", text).status_code == 401, guarded.gateway)
    record.write_text(content)
    wait_until(lambda: guarded.http("GET", "/v1/models", text).status_code == 200, guarded.gateway)


def test_the_operators_key_may_do_everything(guarded: Guarded) -> None:
    for route in routes(guarded):
        method, path = route.split(" ")
        assert guarded.http(method, path, ADMIN_KEY).status_code not in (401, 403), route


def test_the_log_says_who_asked_and_holds_no_key(guarded: Guarded) -> None:
    key, text = guarded.key(*SCOPES, tenant="acme")
    digest = guarded.http("POST", "/v1/documents", text, json={"text": f"{DOCUMENT} Damaged."}).json()["digest"]
    path = guarded.stack.directory / "objects" / "documents" / "acme" / f"{digest[7:]}.json"
    path.write_text("{")
    assert guarded.http("GET", f"/v1/documents/{digest}", text).status_code == 500
    lines = guarded.gateway.log.read_text().splitlines()
    (line,) = [line for line in lines if digest in line and "request failed" in line]
    assert f'"client": "{key.key_id}"' in line
    assert '"tenant": "acme"' in line
    for secret in (text, ADMIN_KEY):
        assert secret.split("_", 2)[2] not in guarded.gateway.log.read_text()


def test_the_command_makes_keys_that_the_sdk_shows(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOUNDRY_STORE__REDIS_URL", guarded.stack.settings.redis_url.get_secret_value())
    monkeypatch.setenv("FOUNDRY_STORE__OBJECTS_URL", guarded.stack.settings.objects_url)
    monkeypatch.setenv("FOUNDRY_GATEWAY", f"http://{guarded.gateway.address}")
    monkeypatch.delenv("FOUNDRY_API_KEY", raising=False)

    def foundry(*arguments: str, status: int = 0) -> Result:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == status, result.output
        return result

    assert "has no API key" in foundry("cartridges", "ls", status=5).stderr
    options = ("--tenant", "initech", "--label", "of the wiki", "--expires-days", "7", "--tokens-per-minute", "9")
    made = foundry("keys", "create", "--scope", "query", "--scope", "train", *options)
    text = made.stdout.strip()
    key_id = KeyText.parse(text).key_id
    assert text not in made.stderr
    (listed,) = [key for key in json.loads(foundry("keys", "list", "--json").stdout) if key["key_id"] == key_id]
    assert (listed["tenant"], listed["scopes"], listed["limits"]["tokens_per_minute"]) == (
        "initech",
        ["query", "train"],
        9,
    )
    table = foundry("keys", "list").stdout
    assert key_id in table
    for shown in (table, str(listed)):
        assert text.split("_", 2)[2] not in shown
    assert "secret_digest" not in listed

    monkeypatch.setenv("FOUNDRY_API_KEY", text)
    assert json.loads(foundry("cartridges", "ls", "--json").stdout) == []
    with FoundryClient(f"http://{guarded.gateway.address}", api_key=text) as client:
        assert client.models()[0]["id"] == "tiny"
        with pytest.raises(PermissionDenied, match="needs the scope admin"):
            client.cartridges.delete("manual")
    foundry("keys", "revoke", key_id)
    assert "was revoked" in foundry("keys", "list").stdout
    with FoundryClient(f"http://{guarded.gateway.address}") as client:
        wait_until(lambda: guarded.http("GET", "/v1/models", text).status_code == 401, guarded.gateway)
        with pytest.raises(Unauthenticated, match="was revoked"):
            client.models()
    assert "scopes.0 must be" in foundry("keys", "create", "--scope", "root", status=2).stderr
    assert "there is no key" in foundry("keys", "revoke", "a" * 12, status=3).stderr


def test_without_keys_a_gateway_that_others_reach_says_so(site: Site) -> None:
    assert "whoever reaches the port may do everything" not in site.gateway.log.read_text()
    port = site.stack.free_port()
    open_to_all = site.stack.spawn("gateway", "--rollout-addresses", site.rollout.address, address=f"0.0.0.0:{port}")
    wait_ready(open_to_all, "/healthz")
    assert "whoever reaches the port may do everything: set api_keys" in open_to_all.log.read_text()
    open_to_all.stop()


# What is known of the store's keys


class Counted(KeyStore):
    num_listings = 0

    async def refreshed(self, known: Mapping[str, Known[ApiKey]]) -> dict[str, Known[ApiKey]]:
        self.num_listings += 1
        return await super().refreshed(known)


async def test_a_flood_of_unknown_keys_costs_one_listing_a_second(tmp_path: Path) -> None:
    store = Counted(Objects.open(f"file://{tmp_path}", retry_seconds=1))
    authentication = Authentication(Keys(store), None, Grants(GrantStore(store._objects)))

    async def ask(number: int) -> None:
        with pytest.raises(Unauthenticated):
            await authentication.principal_of(f"Bearer fdy_{'a' * 10}{chr(97 + number % 26)}b_{'x' * 43}")

    await asyncio.gather(*(ask(number) for number in range(200)))
    assert store.num_listings == 1
    key, text = await store.create(scopes=["query"])
    asking = asyncio.create_task(authentication.principal_of(f"bearer {text}"))
    await asyncio.gather(*(ask(number) for number in range(200)))
    assert (await asking).client == key.key_id
    assert store.num_listings == 2


async def test_while_the_store_is_away_the_last_known_keys_stand(tmp_path: Path) -> None:
    store = KeyStore(Objects.open(f"file://{tmp_path}", retry_seconds=1))
    _, text = await store.create(scopes=["query"])
    keys = Keys(store)
    authentication = Authentication(keys, None, Grants(GrantStore(store._objects)))
    await authentication.principal_of(f"Bearer {text}")
    access = S3Access(endpoint="http://127.0.0.1:9")
    keys._store = KeyStore(Objects.open("s3://away", retry_seconds=0.1, timeout_seconds=5, s3=access))
    # Nobody knows whether this one exists.
    with pytest.raises(StoreUnavailable, match="can't be read now"):
        await authentication.principal_of(f"Bearer fdy_{'a' * 12}_{'x' * 43}")
    await authentication.principal_of(f"Bearer {text}")


@pytest.mark.parametrize("content", [None, "", "secret", f"fdy_operator_{'a' * 43}", "fdy_bootstrapkey_short"])
def test_an_operators_key_that_is_none_is_refused_at_the_start(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_text(content)
    settings = GatewaySettings.model_validate(
        {"api_keys": True, "admin_key_file": path, "store": {"redis_url": "redis://h", "objects_url": "file:///x"}}
    )
    with pytest.raises(InvalidArgument, match="admin_key_file") as caught:
        _ = settings.admin_key
    assert not content or content not in caught.value.message


def test_the_operators_key_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{ADMIN_KEY}\n")
    store = {"redis_url": "redis://h", "objects_url": "file:///x"}
    settings = GatewaySettings.model_validate({"api_keys": True, "admin_key_file": tmp_path / "key", "store": store})
    assert settings.admin_key is not None
    assert settings.admin_key.secret_digest == content_digest(b"a" * 43)
    with pytest.raises(ValueError, match="admin_key_file is for api_keys"):
        GatewaySettings.model_validate({"admin_key_file": tmp_path / "key", "store": store})
