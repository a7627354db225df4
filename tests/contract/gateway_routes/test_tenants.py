"""Names of tenants: each has its own, and nobody sees another's."""

from __future__ import annotations

import json
from typing import Any, NamedTuple, get_args

import pytest

from foundry.identity import content_digest
from foundry.store import CartridgeStore
from foundry.store.api_keys import Scope
from tests.contract.gateway_routes.site import DOCUMENT, Guarded, specification

CHAT = {"messages": [{"role": "user", "content": "How?"}], "max_tokens": 4, "temperature": 0}
TAG = {"version": 1}


class Tenants(NamedTuple):
    """Texts of keys. Each has a cartridge `manual`, tagged `good`."""

    umbrella: str
    tyrell: str
    nobody: str
    digests: dict[str, str]


@pytest.fixture(scope="module")
def tenants(guarded: Guarded) -> Tenants:
    digests = {}
    for seed, name in enumerate(("umbrella/manual", "tyrell/manual", "manual")):
        (manifest,) = guarded.stack.publish(name, guarded.stack.cartridge(seed))
        digests[name] = manifest.digest

        async def tag(store: CartridgeStore, name: str = name) -> None:
            await store.tag(name, "good", 1)

        guarded.stack.with_store(tag)
    scopes = get_args(Scope)
    umbrella, tyrell, nobody = (guarded.key(*scopes, tenant=tenant)[1] for tenant in ("umbrella", "tyrell", ""))
    return Tenants(umbrella, tyrell, nobody, digests)


@pytest.mark.parametrize("tenant", ["umbrella", "tyrell", ""])
def test_a_name_means_the_tenants_own_and_answers_write_it_whole(
    guarded: Guarded, tenants: Tenants, tenant: str
) -> None:
    key = {"umbrella": tenants.umbrella, "tyrell": tenants.tyrell, "": tenants.nobody}[tenant]
    whole = f"{tenant}/manual" if tenant else "manual"
    for name in {"manual", whole}:
        found = guarded.http("GET", f"/v1/cartridges/{name}@good", key).json()
        assert (found["name"], found["version"]["digest"]) == (whole, tenants.digests[whole])
        assert guarded.http("GET", f"/v1/cartridges/{name}/versions", key).json()["data"][0]["name"] == whole
        assert guarded.http("GET", f"/v1/cartridges/{name}/tags/good", key).json()["name"] == whole
        assert guarded.http("PUT", f"/v1/cartridges/{name}/tags/good", key, json=TAG).json()["name"] == whole
        assert guarded.http("GET", f"/v1/models/{name}@1", key).json()["id"] == f"{whole}@1"
        for asked in ({"model": name}, {"model": "tiny", "cartridges": [name]}):
            answer = guarded.http("POST", "/v1/chat/completions", key, json=CHAT | asked).json()
            (cartridge,) = answer["foundry"]["cartridges"]
            assert (cartridge["name"], cartridge["digest"]) == (whole, tenants.digests[whole])


def test_lists_show_the_tenants_own_names(guarded: Guarded, tenants: Tenants) -> None:
    def listed(path: str, field: str, key: str) -> list[str]:
        return [item[field] for item in guarded.http("GET", path, key).json()["data"]]

    for key, tenant in ((tenants.umbrella, "umbrella"), (tenants.tyrell, "tyrell")):
        assert listed("/v1/cartridges", "name", key) == [f"{tenant}/manual"]
        assert listed("/v1/models", "id", key) == ["tiny", f"{tenant}/manual"]
    without = listed("/v1/cartridges", "name", tenants.nobody)
    assert "manual" in without
    assert not any("/" in name for name in without)


REQUESTS: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/v1/cartridges/NAME", {}),
    ("GET", "/v1/cartridges/NAME@good", {}),
    ("GET", "/v1/cartridges/NAME@1", {}),
    ("GET", "/v1/cartridges/NAME/versions", {}),
    ("DELETE", "/v1/cartridges/NAME/versions/1", {}),
    ("PUT", "/v1/cartridges/NAME/tags/new", {"json": TAG}),
    ("GET", "/v1/cartridges/NAME/tags/good", {}),
    ("POST", "/v1/cartridges/NAME/tags/good/rollback", {}),
    ("DELETE", "/v1/cartridges/NAME/tags/good", {}),
    ("POST", "/v1/cartridges/NAME/rollback", {"json": {"to": "1"}}),
    ("DELETE", "/v1/cartridges/NAME", {}),
    ("GET", "/v1/models/NAME", {}),
    ("POST", "/v1/chat/completions", {"json": CHAT | {"model": "NAME"}}),
    ("POST", "/v1/completions", {"json": {"model": "tiny", "cartridges": ["NAME@good"], "prompt": "How?"}}),
    ("POST", "/v1/runs", {"json": specification(text=DOCUMENT, init="version", init_version="NAME@1")}),
]


@pytest.mark.parametrize(("method", "path", "arguments"), REQUESTS)
@pytest.mark.parametrize("foreign", ["tyrell/manual", "tyrell/absent"])
def test_what_is_anothers_is_answered_like_what_does_not_exist(
    guarded: Guarded, tenants: Tenants, method: str, path: str, arguments: dict[str, Any], foreign: str
) -> None:
    def answer(name: str) -> tuple[int, str]:
        def named(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: named(each) for key, each in value.items()}
            if isinstance(value, list):
                return [named(each) for each in value]
            return value.replace("NAME", name) if isinstance(value, str) else value

        found = guarded.http(method, named(path), tenants.umbrella, **named(arguments))
        return found.status_code, found.text.replace(name, "NAME")

    status, body = answer(foreign)
    assert status == 404
    assert (status, body) == answer("umbrella/absent")
    assert guarded.http("GET", "/v1/cartridges/manual@good", tenants.tyrell).status_code == 200


def test_a_run_publishes_under_the_tenants_name(guarded: Guarded, tenants: Tenants) -> None:
    def create(**changes: Any) -> Any:
        return guarded.http("POST", "/v1/runs", tenants.umbrella, json=specification(text=DOCUMENT, **changes))

    starts = {"init": "version", "init_version": "manual@good", "num_tokens": 12}
    for name in ("trained", "umbrella/trained"):
        spec = create(name=name, **starts).json()["spec"]
        assert (spec["name"], spec["init_version"]) == ("umbrella/trained", "umbrella/manual@good")
        assert spec["document"] == content_digest(DOCUMENT.encode())
    for name in ("tyrell/manual", "tyrell/absent"):
        answer = create(name=name)
        assert (answer.status_code, answer.json()["error"]["param"]) == (403, "name")
        assert answer.text == create(name="tyrell/manual").text.replace("tyrell/manual", name)


class Kept(NamedTuple):
    """What tyrell has."""

    digest: str
    run_id: str


ABSENT = Kept("blake3:" + "0" * 64, "run-aaaaaaaa")
PROMPTS = {"kind": "document", "digest": "DIGEST"}
ABOUT_IT: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/v1/documents/DIGEST", {}),
    ("GET", "/v1/documents/DIGEST/content", {}),
    ("DELETE", "/v1/documents/DIGEST", {}),
    ("GET", "/v1/documents?after=DIGEST", {}),
    ("POST", "/v1/runs", {"json": specification(document="DIGEST")}),
    ("POST", "/v1/runs", {"json": specification(text=DOCUMENT, more_documents=["DIGEST"])}),
    ("POST", "/v1/runs", {"json": specification(text=DOCUMENT, prompts=PROMPTS)}),
    ("POST", "/v1/runs", {"json": specification(text=DOCUMENT, heldout=PROMPTS)}),
    ("POST", "/v1/runs", {"json": specification(text=DOCUMENT, init="text", init_text="DIGEST")}),
    ("GET", "/v1/runs/RUN", {}),
    ("GET", "/v1/runs/RUN/events", {}),
    ("GET", "/v1/runs/RUN/dataset", {}),
    ("GET", "/v1/runs/RUN/dataset/rows", {}),
    ("POST", "/v1/runs/RUN/cancel", {}),
    ("POST", "/v1/runs/RUN/pause", {}),
    ("POST", "/v1/runs/RUN/resume", {}),
    ("DELETE", "/v1/runs/RUN", {}),
    ("GET", "/v1/runs?after=RUN", {}),
]


@pytest.fixture(scope="module")
def kept(guarded: Guarded, tenants: Tenants) -> Kept:
    text = {"text": f"{DOCUMENT} Of tyrell alone.", "title": "secret"}
    digest = guarded.http("POST", "/v1/documents", tenants.tyrell, json=text).json()["digest"]
    run = guarded.http("POST", "/v1/runs", tenants.tyrell, json=specification(document=digest)).json()
    return Kept(digest, run["id"])


@pytest.mark.parametrize(("method", "path", "arguments"), ABOUT_IT)
def test_anothers_documents_and_runs_are_answered_like_what_does_not_exist(
    guarded: Guarded, tenants: Tenants, kept: Kept, method: str, path: str, arguments: dict[str, Any]
) -> None:
    def answer(about: Kept) -> tuple[int, str]:
        text = json.dumps([path, arguments]).replace("DIGEST", about.digest).replace("RUN", about.run_id)
        where, what = json.loads(text)
        found = guarded.http(method, where, tenants.umbrella, **what)
        return found.status_code, found.text.replace(about.digest, "DIGEST").replace(about.run_id, "RUN")

    status, body = answer(kept)
    # What is not there is deleted.
    assert status in ((204,) if (method, path) == ("DELETE", "/v1/documents/DIGEST") else (400, 404))
    assert (status, body) == answer(ABSENT)
    assert guarded.http("GET", f"/v1/documents/{kept.digest}", tenants.tyrell).json()["title"] == "secret"
    assert guarded.http("GET", f"/v1/runs/{kept.run_id}", tenants.tyrell).json()["state"] == "queued"


def test_lists_show_the_tenants_own_documents_and_runs(guarded: Guarded, tenants: Tenants, kept: Kept) -> None:
    def listed(path: str, field: str, key: str) -> set[str]:
        return {item[field] for item in guarded.http("GET", path, key).json()["data"]}

    assert kept.digest in listed("/v1/documents", "digest", tenants.tyrell)
    assert kept.run_id in listed("/v1/runs", "id", tenants.tyrell)
    for key in (tenants.umbrella, tenants.nobody):
        assert kept.digest not in listed("/v1/documents", "digest", key)
        assert kept.run_id not in listed("/v1/runs", "id", key)


def test_the_same_text_of_two_tenants_is_two_documents(guarded: Guarded, tenants: Tenants, kept: Kept) -> None:
    text = {"text": f"{DOCUMENT} Of tyrell alone.", "title": "ours"}
    mine = guarded.http("POST", "/v1/documents", tenants.umbrella, json=text).json()
    assert (mine["digest"], mine["title"]) == (kept.digest, "ours")
    assert guarded.http("DELETE", f"/v1/documents/{kept.digest}", tenants.umbrella).status_code == 204
    assert guarded.http("GET", f"/v1/documents/{kept.digest}", tenants.tyrell).json()["title"] == "secret"
