"""What web pages of others can have a browser send to a gateway that the browser reaches."""

from __future__ import annotations

import re

import httpx
import pytest

from services.gateway.middleware.web_pages import hosts_of
from tests.contract.gateway_routes.site import DOCUMENT, Site
from tests.services import wait_ready

_APP = "https://app.example.com"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "", "[", "127.0.0.2"])
def test_a_name_that_somebody_lets_point_here_is_refused(site: Site, host: str) -> None:
    answer = site.http("GET", "/v1/models", headers={"host": host})
    assert answer.status_code in (400, 403)
    assert "data" not in answer.text
    assert site.http("GET", "/healthz", headers={"host": "10.1.2.3:8000"}).status_code == 200


@pytest.mark.parametrize("host", ["localhost:8000", "LOCALHOST", "127.0.0.1", "[::1]:8000"])
def test_names_of_this_machine_are_answered(site: Site, host: str) -> None:
    assert site.http("GET", "/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000", "http://["])
def test_simple_requests_of_other_pages_are_refused(site: Site, origin: str) -> None:
    answer = site.http(
        "POST", "/v1/documents", content=DOCUMENT, headers={"content-type": "text/plain", "origin": origin}
    )
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "PERMISSION_DENIED"


def test_pages_of_its_own_and_pages_that_are_allowed_may_call(site: Site) -> None:
    gateway = site.stack.gateway([site.rollout], "--allowed-origins", f'["{_APP}"]', "--allowed-hosts", "[]")
    wait_ready(gateway)
    here = Site(site.stack, site.rollout, gateway, site.client)
    for origin in (_APP, f"http://{gateway.address}"):
        assert here.http("GET", "/v1/models", headers={"origin": origin}).status_code == 200
    asked = {"origin": _APP, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    answer = here.http("OPTIONS", "/v1/chat/completions", headers=asked)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, _APP)
    assert answer.headers["access-control-max-age"] == "600"
    assert "access-control-allow-credentials" not in answer.headers
    assert here.http("GET", "/v1/models", headers={"origin": "https://evil.example"}).status_code == 403
    assert here.http("GET", "/v1/models", headers={"host": "any.example"}).status_code == 200
    gateway.stop()


def test_what_such_pages_may_do_is_a_setting(site: Site) -> None:
    options = ("--allowed-origins", f'["{_APP}"]', "--allowed-methods", '["GET"]', "--allowed-headers", '["x-own"]')
    more = ("--allow-credentials", "--cors-max-age-seconds", "7")
    gateway = site.stack.gateway([site.rollout], *options, *more)
    wait_ready(gateway)
    here = Site(site.stack, site.rollout, gateway, site.client)

    def preflight(method: str, header: str) -> httpx.Response:
        asked = {"origin": _APP, "access-control-request-method": method, "access-control-request-headers": header}
        return here.http("OPTIONS", "/v1/models", headers=asked)

    answer = preflight("GET", "x-own")
    assert (answer.status_code, answer.headers["access-control-max-age"]) == (200, "7")
    assert answer.headers["access-control-allow-credentials"] == "true"
    assert preflight("POST", "x-own").status_code == preflight("GET", "x-other").status_code == 400
    assert (
        "x-foundry-digest"
        in here.http("GET", "/v1/models", headers={"origin": _APP}).headers["access-control-expose-headers"]
    )
    gateway.stop()


def test_the_documentation_fetches_nothing_from_others(site: Site) -> None:
    page = site.http("GET", "/docs").text
    fetched = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert fetched
    assert "://" not in page.replace(f"http://{site.gateway.address}", "")
    for path in fetched:
        assert site.http("GET", path).status_code == 200


@pytest.mark.parametrize(
    ("listen", "known"),
    [("127.0.0.1:0", True), ("localhost:80", True), ("[::1]:8000", True), ("127.0.0.5:1", True), ("0.0.0.0:1", False)],
)
def test_only_on_loopback_its_names_are_known(listen: str, known: bool) -> None:
    assert bool(hosts_of(listen)) is known
