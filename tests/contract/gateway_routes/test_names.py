"""Names of cartridges that would mean something else too: the base model, or a part of a path."""

from __future__ import annotations

import re

import pytest

from foundry.errors import Conflict, InvalidArgument
from foundry.local.health import warnings_of
from foundry.store import CartridgeStore
from foundry.store.names import RESERVED
from services.gateway.access.scopes import NEEDED
from tests.contract.gateway_routes.site import DOCUMENT, Guarded, Site, specification
from tests.services import wait_ready

CHAT = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 1}


@pytest.mark.parametrize("name", ["tiny", "team/tiny"])
def test_no_run_takes_the_base_models_name(site: Site, name: str) -> None:
    before = len(site.client.runs.list())
    with pytest.raises(Conflict) as raised:
        site.client.runs.create(**specification(text=DOCUMENT, name=name))
    assert raised.value.field == "name"
    assert len(site.client.runs.list()) == before


def test_a_tenants_run_takes_it_no_more_than_another(guarded: Guarded) -> None:
    _, key = guarded.key("train", tenant="acme")
    answer = guarded.http("POST", "/v1/runs", key, json=specification(text=DOCUMENT, name="tiny"))
    assert (answer.status_code, answer.json()["error"]["param"]) == (409, "name")


def test_a_cartridge_of_that_name_is_never_answered_without(site: Site) -> None:
    """It was there before the model was served by that name."""
    rollout = site.stack.rollout("--model-name", "handbook-base")
    site.stack.publish("handbook-base", site.stack.cartridge(1))
    site.stack.publish("acme/handbook-base", site.stack.cartridge(2))
    gateway = site.stack.gateway([rollout])
    wait_ready(gateway)
    other = Site(site.stack, rollout, gateway, site.client)
    for path, body in (("chat/completions", CHAT), ("completions", {"prompt": "Hello.", "max_tokens": 1})):
        answer = other.http("POST", f"/v1/{path}", json={"model": "handbook-base", **body})
        assert (answer.status_code, answer.json()["error"]["param"]) == (409, "model")
    named = other.http("POST", "/v1/chat/completions", json={"model": "handbook-base@latest", **CHAT})
    assert [each["name"] for each in named.json()["foundry"]["cartridges"]] == ["handbook-base"]
    warnings = warnings_of(f"http://{gateway.address}")
    assert [re.findall("cartridge ([a-z/-]+):", each) for each in warnings] == [
        ["acme/handbook-base"],
        ["handbook-base"],
    ]
    assert "a cartridge has the base model's name" in gateway.log.read_text()
    assert warnings_of(f"http://{site.gateway.address}") == []
    for process in (gateway, rollout):
        process.stop()


def test_words_of_paths_behind_a_name_are_reserved() -> None:
    behind = {word for route in NEEDED for word in re.findall(r"cartridges/{name:path}/(\w+)", route)}
    behind |= {word for route in NEEDED for word in re.findall(r"cartridges/{name:path}/.*}/(\w+)", route)}
    assert behind <= RESERVED


@pytest.mark.parametrize("word", sorted(RESERVED))
def test_a_name_is_not_a_part_of_a_path(site: Site, word: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        site.client.runs.create(**specification(text=DOCUMENT, name=f"team/{word}"))
    assert raised.value.field == "name"

    async def publish(store: CartridgeStore) -> None:
        await store.acquire(f"team/{word}", "import-1", 1)

    with pytest.raises(InvalidArgument):
        site.stack.with_store(publish)
    # Without a tenant it is a name like another.
    site.stack.publish(word, site.stack.cartridge(1))
    assert site.client.cartridges.get(word)["name"] == word
    assert len(site.client.cartridges.versions(word)) == 1
    site.client.cartridges.delete(word)
