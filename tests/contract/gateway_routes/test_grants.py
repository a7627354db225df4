"""A cartridge that another tenant may query, and what it may not."""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import pytest
from typer.testing import CliRunner

from foundry.cli.main import app
from foundry.client import FoundryClient
from foundry.errors import CartridgeNotFound, GrantNotFound, InvalidArgument
from foundry.store.api_keys import Scope
from tests.contract.gateway_routes.site import DOCUMENT, Guarded, specification
from tests.services import wait_until

CHAT = {"messages": [{"role": "user", "content": "How?"}], "max_tokens": 4, "temperature": 0}
NAME = "lender/manual"


class Keys(NamedTuple):
    lender: str
    borrower: str
    digest: str


@pytest.fixture(scope="module")
def keys(guarded: Guarded) -> Keys:
    """The borrower is granted one of the lender's two cartridges."""
    (manifest,) = guarded.stack.publish(NAME, guarded.stack.cartridge(7))
    guarded.stack.publish("lender/other", guarded.stack.cartridge(8))
    lender, borrower = (guarded.key(*get_args(Scope), tenant=tenant)[1] for tenant in ("lender", "borrower"))
    answer = guarded.http("PUT", "/v1/cartridges/manual/grants/borrower", lender)
    assert (answer.status_code, answer.json()["name"], answer.json()["tenant"]) == (200, NAME, "borrower")
    _wait(guarded, borrower, 200)
    return Keys(lender, borrower, manifest.digest)


def _wait(guarded: Guarded, key: str, status: int) -> None:
    wait_until(lambda: guarded.http("GET", f"/v1/cartridges/{NAME}", key).status_code == status, guarded.gateway)


def test_what_is_granted_can_be_seen_and_queried(guarded: Guarded, keys: Keys) -> None:
    for reference in (NAME, f"{NAME}@1", f"{NAME}@{keys.digest}"):
        assert guarded.http("GET", f"/v1/cartridges/{reference}", keys.borrower).json()["name"] == NAME
        assert guarded.http("GET", f"/v1/models/{reference}", keys.borrower).json()["id"] == reference
        for asked in ({"model": reference}, {"model": "tiny", "cartridges": [reference]}):
            answer = guarded.http("POST", "/v1/chat/completions", keys.borrower, json=CHAT | asked).json()
            assert answer["foundry"]["cartridges"][0]["digest"] == keys.digest
    for path, field in (("/v1/cartridges", "name"), ("/v1/models", "id")):
        listed = [each[field] for each in guarded.http("GET", path, keys.borrower).json()["data"]]
        assert NAME in listed
        assert "lender/other" not in listed


REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/v1/cartridges/NAME/versions", {}),
    ("DELETE", "/v1/cartridges/NAME/versions/1", {}),
    ("PUT", "/v1/cartridges/NAME/tags/new", {"json": {"version": 1}}),
    ("GET", "/v1/cartridges/NAME/tags/good", {}),
    ("DELETE", "/v1/cartridges/NAME/tags/good", {}),
    ("POST", "/v1/cartridges/NAME/rollback", {"json": {"to": "1"}}),
    ("DELETE", "/v1/cartridges/NAME", {}),
    ("GET", "/v1/cartridges/NAME/grants", {}),
    ("PUT", "/v1/cartridges/NAME/grants/third", {}),
    ("DELETE", "/v1/cartridges/NAME/grants/borrower", {}),
    ("POST", "/v1/runs", {"json": specification(text=DOCUMENT, init="version", init_version="NAME@1")}),
]


@pytest.mark.parametrize(("method", "path", "arguments"), REFUSED)
def test_what_is_granted_is_for_nothing_else(
    guarded: Guarded, keys: Keys, method: str, path: str, arguments: dict[str, Any]
) -> None:
    def answer(name: str) -> tuple[int, str]:
        body = {"json": {key: _named(each, name) for key, each in arguments["json"].items()}} if arguments else {}
        found = guarded.http(method, _named(path, name), keys.borrower, **body)
        return found.status_code, found.text.replace(name, "NAME")

    granted = answer(NAME)
    assert granted[0] == 404
    # As any that is another's.
    assert granted == answer("lender/other")
    assert guarded.http("GET", f"/v1/cartridges/{NAME}", keys.borrower).status_code == 200


def _named(value: Any, name: str) -> Any:
    return value.replace("NAME", name) if isinstance(value, str) else value


def test_a_grant_is_of_one_tenant_and_needs_the_scope_to_query(guarded: Guarded, keys: Keys) -> None:
    _, third = guarded.key(*get_args(Scope), tenant="third")
    assert guarded.http("GET", f"/v1/cartridges/{NAME}", third).status_code == 404
    _, train = guarded.key("train", tenant="borrower")
    assert guarded.http("GET", f"/v1/cartridges/{NAME}", train).status_code == 403
    _, query = guarded.key("query", tenant="lender")
    assert guarded.http("PUT", f"/v1/cartridges/{NAME}/grants/third", query).status_code == 403


def test_grants_by_sdk_and_command(guarded: Guarded, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://{guarded.gateway.address}"
    monkeypatch.setenv("FOUNDRY_GATEWAY", url)
    monkeypatch.setenv("FOUNDRY_API_KEY", keys.lender)

    def foundry(*arguments: str) -> str:
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    _, reader = guarded.key("query", tenant="reader")
    with FoundryClient(url, api_key=keys.lender) as client:
        client.cartridges.grant("manual", "reader")
        client.cartridges.grant(NAME, "writer")
        assert [each["tenant"] for each in client.cartridges.grants(NAME)] == ["borrower", "reader", "writer"]
        _wait(guarded, reader, 200)
        assert "may not query" in foundry("cartridges", "grant", NAME, "reader", "--remove")
        _wait(guarded, reader, 404)
        client.cartridges.ungrant(NAME, "writer")
        assert "may query" in foundry("cartridges", "grant", "manual", "writer")
        assert "writer" in foundry("cartridges", "grants", NAME)
        client.cartridges.ungrant(NAME, "writer")
        with pytest.raises(GrantNotFound):
            client.cartridges.ungrant(NAME, "writer")
        for name in ("absent", "borrower/absent"):
            with pytest.raises(CartridgeNotFound):
                client.cartridges.grant(name, "reader")
            with pytest.raises(CartridgeNotFound):
                client.cartridges.grants(name)
        for tenant in ("lender", "Not a tenant"):
            with pytest.raises(InvalidArgument):
                client.cartridges.grant(NAME, tenant)


def test_a_deleted_name_is_granted_to_nobody(guarded: Guarded, keys: Keys) -> None:
    guarded.stack.publish("lender/brief", guarded.stack.cartridge(9))
    assert guarded.http("PUT", "/v1/cartridges/brief/grants/borrower", keys.lender).status_code == 200
    assert guarded.http("DELETE", "/v1/cartridges/brief", keys.lender).status_code == 204
    guarded.stack.publish("lender/brief", guarded.stack.cartridge(9))
    assert guarded.http("GET", "/v1/cartridges/brief/grants", keys.lender).json()["data"] == []
