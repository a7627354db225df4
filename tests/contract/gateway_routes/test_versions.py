"""Versions as files, and what was measured of two of them."""

from __future__ import annotations

import socket

import pytest
import safetensors.numpy

from foundry.identity import CartridgeBytes
from foundry.store import CartridgeStore, Grant, ManifestDraft
from foundry.store.api_keys import Scope
from tests.contract.gateway_routes.site import Guarded, Site
from tests.services import wait_ready

FILE = "/v1/cartridges/{}/versions/{}/file"


def test_a_version_is_sent_as_the_file_that_it_is(site: Site) -> None:
    (manifest,) = site.stack.publish("acme/filed", site.stack.cartridge(7))
    answer = site.http("GET", FILE.format("acme/filed", 1))
    assert answer.status_code == 200, answer.text
    assert CartridgeBytes.from_file(answer.content).digest() == manifest.digest
    assert set(safetensors.numpy.load(answer.content)) >= {"layers.0.key", "layers.0.value"}
    assert answer.headers["x-foundry-digest"] == manifest.digest
    assert answer.headers["etag"] == f'"{manifest.digest}"'
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.headers["content-disposition"] == 'attachment; filename="acme-filed-1.safetensors"'
    head = site.http("HEAD", FILE.format("acme/filed", 1))
    assert (head.headers["x-foundry-digest"], head.content) == (manifest.digest, b"")


@pytest.mark.parametrize(("name", "version", "param"), [("filed", 7, "version"), ("nobody", 1, "version")])
def test_a_version_that_is_not_there_is_no_file(site: Site, name: str, version: int, param: str) -> None:
    site.stack.publish("filed", site.stack.cartridge(8))
    answer = site.http("GET", FILE.format(name, version))
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, param)


def test_only_so_many_bytes_are_held_to_be_sent(site: Site) -> None:
    cartridge = site.stack.cartridge(9, num_tokens=20_000)
    num_bytes = cartridge.header.num_bytes
    gateway = site.stack.gateway([site.rollout], "--transfer-memory-bytes", str(num_bytes * 3 // 2))
    wait_ready(gateway)
    site.stack.publish("held", cartridge)
    site.stack.publish("longer", site.stack.cartridge(9, num_tokens=40_000))
    here = Site(site.stack, site.rollout, gateway, site.client)
    host, _, port = gateway.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as slow:
        slow.sendall(f"GET {FILE.format('held', 1)} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        assert slow.recv(16).startswith(b"HTTP/1.1 200")
        refused = here.http("GET", FILE.format("held", 1))
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    too_large = here.http("GET", FILE.format("longer", 1))
    assert (too_large.status_code, too_large.headers.get("retry-after")) == (429, None)
    assert "moves none of more than" in too_large.json()["error"]["message"]
    gateway.stop()


def test_a_file_is_for_who_may_train_and_whose_it_is(guarded: Guarded) -> None:
    guarded.stack.publish("filer/own", guarded.stack.cartridge(3))

    async def grant(store: CartridgeStore) -> Grant:
        return await store.grants.put("filer/own", "other")

    guarded.stack.with_store(grant)
    asked: list[tuple[str, Scope, int]] = [("filer", "train", 200), ("filer", "query", 403), ("other", "train", 404)]
    for tenant, scope, status in asked:
        _, key = guarded.key(scope, tenant=tenant)
        assert guarded.http("GET", FILE.format("filer/own", 1), key).status_code == status, (tenant, scope)


@pytest.fixture(scope="module")
def measured(site: Site) -> str:
    async def publish(store: CartridgeStore) -> None:
        await store.acquire("measured", "run-m", 1)
        for step, metrics in ((0, {"heldout_kl": 0.5, "seconds": 3.0}), (20, {"heldout_kl": 0.125, "loss": 0.25})):
            draft = ManifestDraft(
                name="measured", run="run-m", attempt=1, step=step, tokens_seen=10 * step, metrics=metrics
            )
            await store.publish(site.stack.cartridge(step).to_bytes(), draft, durable=True)
        await store.tag("measured", "good", 2)
        await store.release("measured", "run-m", 1)

    site.stack.with_store(publish)
    return "measured"


def test_two_versions_are_compared(site: Site, measured: str) -> None:
    found = site.http("GET", f"/v1/cartridges/{measured}/compare?from=1&to=good").json()
    assert (found["from"]["version"], found["to"]["version"]) == (1, 2)
    assert found["from"]["metrics"] == {"heldout_kl": 0.5, "seconds": 3.0}
    assert (found["changes"], found["steps"], found["tokens_seen"]) == ({"heldout_kl": -0.375}, 20, 200)
    same = site.http("GET", f"/v1/cartridges/{measured}/compare?from=latest&to={found['to']['digest']}").json()
    assert (same["from"], same["steps"]) == (same["to"], 0)


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ("from=7&to=1", 404, "from"),
        ("from=1&to=nothing", 404, "to"),
        ("from=1", 400, "to"),
        ("from=1&to=No%20Tag", 400, "to"),
    ],
)
def test_what_can_t_be_compared_is_named(site: Site, measured: str, query: str, status: int, param: str) -> None:
    answer = site.http("GET", f"/v1/cartridges/{measured}/compare?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
