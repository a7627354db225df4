"""Cartridges: listed, tagged, deleted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from foundry.errors import CartridgeNotFound, Conflict, DigestMismatch, InvalidArgument
from foundry.store import CartridgeStore
from tests.contract.gateway_routes.site import Site
from tests.store_data import cartridge


def test_cartridges_are_listed_tagged_and_deleted(site: Site) -> None:
    first, second = site.stack.publish("hooli/manual", site.stack.cartridge(1), site.stack.cartridge(2))
    client = site.client.cartridges
    found = client.get("hooli/manual")
    assert (found["name"], found["tags"]) == ("hooli/manual", {})
    assert (found["version"]["version"], found["version"]["digest"]) == (2, second.digest)
    assert found["version"]["header"]["num_tokens"] == 12
    assert {key: found[key] for key in ("object", "name", "tags", "version")} in client.list()
    assert [(item["version"], item["durable"]) for item in client.versions("hooli/manual")] == [(1, True), (2, True)]

    client.tag("hooli/manual", "good", 1)
    assert client.get("hooli/manual@good")["version"]["digest"] == first.digest
    assert client.get(f"hooli/manual@{first.digest}")["tags"] == {"good": 1}
    with pytest.raises(Conflict):
        client.delete("hooli/manual", 1)
    with pytest.raises(Conflict):
        client.delete("hooli/manual", 2)
    with pytest.raises(CartridgeNotFound):
        client.tag("hooli/manual", "good", 3)
    with pytest.raises(InvalidArgument):
        client.tag("hooli/manual", "latest", 1)

    client.untag("hooli/manual", "good")
    with pytest.raises(CartridgeNotFound):
        client.untag("hooli/manual", "good")
    client.delete("hooli/manual", 1)
    assert [item["version"] for item in client.versions("hooli/manual")] == [2]
    client.delete("hooli/manual")
    for missing in (lambda: client.get("hooli/manual"), lambda: client.versions("hooli/manual")):
        with pytest.raises(CartridgeNotFound):
            missing()
    with pytest.raises(CartridgeNotFound):
        client.delete("hooli/manual")


def test_wrong_references_name_their_parameter(site: Site) -> None:
    for path, status in (("/v1/cartridges/No%20Name", 400), ("/v1/cartridges/nobody@7", 404)):
        answer = site.http("GET", path)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, "name")
    assert site.http("PUT", "/v1/cartridges/a/tags/b", json={"version": "1"}).json()["error"]["param"] == "version"
    site.stack.publish("rolled", site.stack.cartridge(1))
    for to in ("7", "nothing", "rolled@7", "blake3:" + "0" * 64):
        answer = site.http("POST", "/v1/cartridges/rolled/rollback", json={"to": to})
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "to")


def test_a_damaged_name_takes_no_other_with_it(site: Site) -> None:
    for name in ("damaged/type", "damaged/field", "whole"):
        site.stack.publish(name, site.stack.cartridge(1))

    async def damage(store: CartridgeStore) -> None:
        redis = store._connection.redis
        await redis.delete("foundry:versions:damaged/type")
        await redis.set("foundry:versions:damaged/type", "a string")
        await redis.hset("foundry:versions:damaged/field", "1", cartridge(0).digest() + " " + "[" * 100_000)

    async def restore(store: CartridgeStore) -> None:
        await store.rebuild(force=True)

    site.stack.with_store(damage)
    for path, key in (("/v1/models", "id"), ("/v1/cartridges", "name")):
        listed = {item[key] for item in site.http("GET", path).json()["data"]}
        assert "whole" in listed
        assert not listed & {"damaged/type", "damaged/field"}
    for name in ("damaged/type", "damaged/field"):
        answer = site.http("GET", f"/v1/cartridges/{name}")
        assert answer.json()["error"]["code"] == "DIGEST_MISMATCH", answer.text
    site.stack.with_store(restore)
    assert {"damaged/type", "damaged/field", "whole"} <= {item["name"] for item in site.client.cartridges.list()}


def test_a_damaged_newest_version_is_decided_about_by_the_commands_that_its_error_names(site: Site) -> None:
    first, second = site.stack.publish("torn", site.stack.cartridge(1), site.stack.cartridge(2))
    site.client.cartridges.tag("torn", "prod", second.version)

    async def tear(store: CartridgeStore) -> None:
        await store.objects.put("cartridges/torn/0000000002.json", [b"{"])
        await store.rebuild(force=True)

    def foundry(*arguments: str) -> str:
        command = [sys.executable, "-m", "foundry.cli.main", "cartridges", *arguments]
        environment = os.environ | {"FOUNDRY_GATEWAY": f"http://{site.gateway.address}"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stderr

    site.stack.with_store(tear)
    with pytest.raises(DigestMismatch, match="'foundry cartridges tag torn@VERSION prod'"):
        site.client.cartridges.get("torn@prod")
    foundry("tag", "torn@1", "prod")
    assert site.client.cartridges.get("torn@prod")["version"]["digest"] == first.digest
    with pytest.raises(DigestMismatch, match="'foundry cartridges rm torn@2'"):
        site.client.cartridges.get("torn")
    foundry("rm", "torn@2", "--yes")
    assert site.client.cartridges.get("torn")["version"]["digest"] == first.digest
