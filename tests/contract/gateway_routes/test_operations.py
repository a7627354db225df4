"""What operators and clients of every route rely on: health, metrics, error objects, documentation."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest

from foundry.client import FoundryClient
from foundry.errors import Unavailable
from tests.contract.gateway_routes.site import Site
from tests.services import get, metric, wait_ready


def test_health_and_readiness(site: Site) -> None:
    assert site.http("GET", "/healthz").json() == {"status": "ok"}
    assert site.client.ready() == {"status": "ok", "reasons": {}, "warnings": []}


def test_health_and_version_are_as_vllms(site: Site) -> None:
    for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
        answer = site.http(method, path)
        assert (answer.status_code, answer.content) == (200, b"")
    assert site.http("GET", "/version").json() == {"version": version("cartridge-foundry")}
    alone = site.stack.gateway([])
    wait_ready(alone, "/healthz")
    for path in ("/health", "/ping"):
        assert get(alone, path).status_code == 503
    alone.stop()


def test_metrics_count_by_route_template(site: Site) -> None:
    def count(**labels: str) -> float:
        return metric(site.gateway.metrics, "foundry_gateway_requests_total", **labels)

    template = "/v1/documents/{digest}"
    before = count(route=template, status="404")
    site.http("GET", "/v1/documents/blake3:" + "a" * 64)
    assert count(route=template, status="404") == before + 1
    tokens = metric(site.gateway.metrics, "foundry_gateway_generation_tokens_total")
    answer = site.client.chat("tiny", "How?", max_tokens=7, ignore_eos=True)
    assert answer.completion_tokens == 7
    assert metric(site.gateway.metrics, "foundry_gateway_generation_tokens_total") == tokens + 7
    assert metric(site.gateway.metrics, "foundry_gateway_time_to_first_token_seconds_count") > 0


@pytest.mark.parametrize(
    ("method", "path", "arguments", "status"),
    [
        ("GET", "/v1/nothing", {}, 404),
        ("DELETE", "/v1/models", {}, 405),
        ("POST", "/v1/chat/completions", {"content": b"{", "headers": {"content-type": "application/json"}}, 400),
        ("POST", "/v1/chat/completions", {"json": ["a"]}, 400),
        ("POST", "/v1/chat/completions", {"content": b"{}", "headers": {"content-type": "text/plain"}}, 400),
        (
            "POST",
            "/v1/chat/completions",
            {
                "content": b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
                "headers": {"content-type": "application/json"},
            },
            400,
        ),
        (
            "POST",
            "/v1/chat/completions",
            {"content": b'{"\\ud800": 1}', "headers": {"content-type": "application/json"}},
            400,
        ),
        (
            "POST",
            "/v1/completions",
            {"content": b"[" * 100_000, "headers": {"content-type": "application/json"}},
            400,
        ),
        ("POST", "/v1/documents", {"content": b"{}", "headers": {"content-type": "application/xml"}}, 415),
        ("POST", "/v1/runs", {"json": [1]}, 400),
    ],
)
def test_every_error_is_an_openai_error_object(
    site: Site, method: str, path: str, arguments: dict[str, Any], status: int
) -> None:
    answer = site.http(method, path, **arguments)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"


def test_the_documentation_describes_every_route(site: Site) -> None:
    assert site.http("GET", "/docs").status_code == 200
    paths = site.http("GET", "/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/runs/{run_id}/events", "/v1/documents", "/readyz"} <= set(paths)


def test_the_gateway_runs_without_torch_and_transformers() -> None:
    program = "import sys, services.gateway.main; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_a_gateway_the_sdk_says_so() -> None:
    with FoundryClient("http://127.0.0.1:9") as client, pytest.raises(Unavailable):
        client.models()
