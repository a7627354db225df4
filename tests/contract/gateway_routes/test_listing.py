"""Lists, a page at a time."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.gateway_routes.site import Site, specification

LISTS = ("/v1/cartridges", "/v1/cartridges/listed-0/versions", "/v1/documents", "/v1/runs", "/v1/models")


@pytest.fixture(scope="module", autouse=True)
def listed(site: Site) -> None:
    for number in range(3):
        site.stack.publish(f"listed-{number}", *(site.stack.cartridge(seed) for seed in range(3)))
        site.client.documents.create(f"Document {number} of those that are listed.")
        site.client.runs.cancel(site.client.runs.create(**specification(text=f"Of run {number}. " * 20))["id"])


def pages(site: Site, path: str, limit: int) -> list[dict[str, Any]]:
    found = [site.http("GET", path, params={"limit": limit}).json()]
    while found[-1]["has_more"]:
        found.append(site.http("GET", path, params={"limit": limit, "after": found[-1]["last_id"]}).json())
    return found


@pytest.mark.parametrize("path", LISTS)
def test_pages_have_what_the_whole_list_has(site: Site, path: str) -> None:
    (whole,) = pages(site, path, 1000)
    assert whole["last_id"] is None
    assert len(whole["data"]) >= 3
    for limit in (1, 2):
        found = pages(site, path, limit)
        assert [entry for page in found for entry in page["data"]] == whole["data"]
        # The base model is no cartridge.
        assert all(len(page["data"]) <= limit + (path == "/v1/models") for page in found)


def test_the_sdk_reads_page_after_page(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = (site.client.documents.list, site.client.runs.list, site.client.cartridges.list, site.client.models)
    whole = [each() for each in lists]
    monkeypatch.setattr("foundry.client.wire.PAGE", 2)
    assert [each() for each in lists] == whole


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize("asked", [{"limit": 0}, {"limit": 1001}, {"limit": "x"}, {"after": "a" * 257}])
def test_what_is_no_page_is_refused(site: Site, path: str, asked: dict[str, Any]) -> None:
    answer = site.http("GET", path, params=asked)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(asked)))


@pytest.mark.parametrize("path", ["/v1/documents", "/v1/runs", "/v1/cartridges/listed-0/versions"])
def test_a_list_that_has_lost_its_place_says_so(site: Site, path: str) -> None:
    answer = site.http("GET", path, params={"after": "gone"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "after")


def test_names_keep_the_place_of_one_that_is_gone(site: Site) -> None:
    answer = site.http("GET", "/v1/cartridges", params={"after": "listed-0a", "limit": 2}).json()
    assert [entry["name"] for entry in answer["data"]] == ["listed-1", "listed-2"]
