"""Cartridges: listed, tagged, deleted."""

from __future__ import annotations

import pytest

from foundry.errors import CartridgeNotFound, Conflict, InvalidArgument
from tests.contract.gateway_routes.site import Site


def test_cartridges_are_listed_tagged_and_deleted(site: Site) -> None:
    first, second = site.stack.publish("acme/manual", site.stack.cartridge(1), site.stack.cartridge(2))
    client = site.client.cartridges
    found = client.get("acme/manual")
    assert (found["name"], found["tags"]) == ("acme/manual", {})
    assert (found["version"]["version"], found["version"]["digest"]) == (2, second.digest)
    assert found["version"]["header"]["num_tokens"] == 12
    assert {key: found[key] for key in ("object", "name", "tags", "version")} in client.list()
    assert [(item["version"], item["durable"]) for item in client.versions("acme/manual")] == [(1, True), (2, True)]

    client.tag("acme/manual", "good", 1)
    assert client.get("acme/manual@good")["version"]["digest"] == first.digest
    assert client.get(f"acme/manual@{first.digest}")["tags"] == {"good": 1}
    with pytest.raises(Conflict):
        client.delete("acme/manual", 1)
    with pytest.raises(Conflict):
        client.delete("acme/manual", 2)
    with pytest.raises(CartridgeNotFound):
        client.tag("acme/manual", "good", 3)
    with pytest.raises(InvalidArgument):
        client.tag("acme/manual", "latest", 1)

    client.untag("acme/manual", "good")
    with pytest.raises(CartridgeNotFound):
        client.untag("acme/manual", "good")
    client.delete("acme/manual", 1)
    assert [item["version"] for item in client.versions("acme/manual")] == [2]
    client.delete("acme/manual")
    for missing in (lambda: client.get("acme/manual"), lambda: client.versions("acme/manual")):
        with pytest.raises(CartridgeNotFound):
            missing()
    with pytest.raises(CartridgeNotFound):
        client.delete("acme/manual")


def test_wrong_references_name_their_parameter(site: Site) -> None:
    for path, status in (("/v1/cartridges/No%20Name", 400), ("/v1/cartridges/nobody@7", 404)):
        answer = site.http("GET", path)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, "reference")
    assert site.http("PUT", "/v1/cartridges/a/tags/b", json={"version": "1"}).json()["error"]["param"] == "version"
