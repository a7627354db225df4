"""Limits as clients meet them. Each gateway has a store for itself: where there are no keys, all who ask are counted
together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import httpx
import pytest

from foundry.client import FoundryClient
from foundry.errors import InvalidArgument
from tests.contract.gateway_routes.site import DOCUMENT, Site, specification
from tests.process import Process
from tests.services import metric, wait_ready, wait_serving, wait_until

_DATABASES = count(1)
BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Go on."}], "max_tokens": 5}


def limited(site: Site, *options: str) -> Process:
    number = next(_DATABASES)
    redis, objects = f"{site.stack.valkey.url}/{number}", f"file://{site.stack.directory}/limited-{number}"
    store = ("--store.redis-url", redis, "--store.objects-url", objects)
    gateway = site.stack.gateway([site.rollout], *store, *options)
    wait_ready(gateway)
    return gateway


def chat(gateway: Process, **changes: Any) -> httpx.Response:
    url = f"http://{gateway.address}/v1/chat/completions"
    return httpx.post(url, json=BODY | {"ignore_eos": True} | changes, trust_env=False, timeout=60)


def refused(gateway: Process, limit: str) -> float:
    return metric(gateway.metrics, "foundry_gateway_limited_requests_total", limit=limit)


def test_answers_say_what_is_left_and_refusals_when_to_come_back(site: Site) -> None:
    gateway = limited(site, "--limits.requests-per-minute", "3", "--limits.tokens-per-minute", "1000")
    url = f"http://{gateway.address}"
    # What fails counts; what is asked of the gateway itself does not.
    missing = httpx.get(f"{url}/v1/cartridges/missing", trust_env=False)
    assert (missing.status_code, missing.headers["x-ratelimit-remaining-requests"]) == (404, "2")
    assert "x-ratelimit-limit-requests" not in httpx.get(f"{url}/healthz", trust_env=False).headers
    answer = chat(gateway)
    assert {name: value for name, value in answer.headers.items() if name.startswith("x-ratelimit")} == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": answer.headers["x-ratelimit-reset-requests"],
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "1000",
        "x-ratelimit-reset-tokens": "0ms",
    }
    num_tokens = answer.json()["usage"]["total_tokens"]
    assert chat(gateway).headers["x-ratelimit-remaining-tokens"] == str(1000 - num_tokens)
    # Refused unread: nobody looks at what this is.
    answer = httpx.post(f"{url}/v1/completions", content=b"{" * 1000, trust_env=False)
    assert answer.status_code == 429
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert 0 < int(answer.headers["retry-after"]) <= 120
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert answer.json()["error"]["code"] == "RESOURCE_EXHAUSTED"
    assert refused(gateway, "requests_per_minute") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_answers_are_used_up(site: Site, *, stream: bool) -> None:
    gateway = limited(site, "--limits.tokens-per-minute", "20")
    # What remains is not asked of an answer: it is as long as it was asked to be.
    assert chat(gateway, max_tokens=30, stream=stream).status_code == 200
    answer = chat(gateway)
    assert answer.status_code == 429
    assert "20 tokens" in answer.json()["error"]["message"]
    assert refused(gateway, "tokens_per_minute") == 1


def test_an_answer_that_is_left_counts_as_far_as_it_came_and_frees_its_place(site: Site) -> None:
    gateway = limited(site, "--limits.tokens-per-minute", "100000", "--limits.concurrent-requests", "1")
    url = f"http://{gateway.address}/v1/chat/completions"
    whole = chat(gateway, max_tokens=1).json()["usage"]["total_tokens"]
    body = BODY | {"max_tokens": 400, "stream": True, "ignore_eos": True, "n": 8}
    with httpx.Client(trust_env=False, timeout=60) as client, client.stream("POST", url, json=body) as held:
        assert held.status_code == 200
        answer = chat(gateway)
        assert answer.status_code == 429
        assert "1 completions at one time" in answer.json()["error"]["message"]
    wait_until(lambda: metric(gateway.metrics, "foundry_gateway_completions_in_flight") == 0, gateway)
    answer = chat(gateway)
    assert answer.status_code == 200
    used = 100_000 - int(answer.headers["x-ratelimit-remaining-tokens"])
    # Its prompt too, which the first token already says.
    assert 2 * whole <= used < whole + 8 * 400


def test_runs_that_are_not_over_are_limited_whoever_asks_first(site: Site) -> None:
    gateway = limited(site, "--limits.concurrent-runs", "2")

    def create(number: int) -> httpx.Response:
        body = specification(name=f"name-{number}", text=f"{DOCUMENT} {number}")
        return httpx.post(f"http://{gateway.address}/v1/runs", json=body, trust_env=False, timeout=60)

    with FoundryClient(f"http://{gateway.address}") as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(create, range(8)))
        first, second = [answer.json()["id"] for answer in answers if answer.status_code == 201]
        num_documents = len(client.documents.list())
        answer = create(8)
        assert answer.status_code == 429
        assert "2 runs are not over" in answer.json()["error"]["message"]
        assert "retry-after" not in answer.headers
        # Nothing was stored for it.
        assert len(client.documents.list()) == num_documents
        client.runs.pause(first)
        assert create(9).status_code == 429
        client.runs.cancel(second)
        assert create(10).status_code == 201
    assert refused(gateway, "concurrent_runs") == 8


def test_a_run_has_so_many_steps_at_most_whoever_chose_them(site: Site) -> None:
    teacher = site.stack.spawn("teacher", "--model", str(site.stack.model))
    wait_serving(teacher)
    gateway = limited(site, "--limits.steps-per-run", "20", "--teacher-address", teacher.address)
    asked = specification(text=DOCUMENT)
    del asked["num_steps"]
    with FoundryClient(f"http://{gateway.address}") as client:
        for more in ({"num_steps": 21}, {"recipe": "thorough"}):
            with pytest.raises(InvalidArgument, match="the limit is 20") as raised:
                client.runs.create(**asked | more)
            assert raised.value.field == "num_steps"
        # What a recipe may choose is judged when it has.
        assert client.runs.create(**asked, recipe="quick")["spec"]["num_steps"] == 20
    assert refused(gateway, "steps_per_run") == 2


def test_documents_and_runs_are_refused_once_the_bytes_are_used_up(site: Site) -> None:
    gateway = limited(site, "--limits.stored-bytes", "1000", "--census-seconds", "0.2")
    url = f"http://{gateway.address}"
    text = {"content-type": "text/plain"}

    def put(content: bytes) -> int:
        return httpx.post(f"{url}/v1/documents", content=content, headers=text, trust_env=False).status_code

    def run() -> int:
        return httpx.post(f"{url}/v1/runs", json=specification(document=digest), trust_env=False).status_code

    def look_twice() -> None:
        """Until a look is over that began from now on: what is put during one counts twice until the next."""
        for _ in range(2):
            before = metric(gateway.metrics, looked)
            wait_until(lambda: metric(gateway.metrics, looked) > before, gateway)  # noqa: B023

    looked = "foundry_store_census_timestamp_seconds"
    with FoundryClient(url) as client:
        digest = client.documents.create("a" * 600)["digest"]
        look_twice()
        assert put(b"b" * 401) == 429
        # What was refused for another reason takes nothing.
        assert put(b"\0" * 400) == 400
        client.documents.create("b" * 400)
        assert put(b"c") == 429
        assert run() == 429
        # What is found is what was put.
        look_twice()
        assert put(b"c") == run() == 429
    assert refused(gateway, "stored_bytes") == 5
