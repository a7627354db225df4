"""The gateway when it is full, when servers die, when Redis is gone, when it is told to end."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from foundry.client import FoundryClient
from foundry.errors import StoreUnavailable
from tests.contract.gateway_routes.site import DOCUMENT, Site, specification
from tests.services import get, metric, resident, wait_ready, wait_serving, wait_until


def test_too_many_requests_are_refused_with_a_time_to_come_back(site: Site) -> None:
    gateway = site.stack.gateway([site.rollout], "--max-concurrent-requests", "1")
    wait_ready(gateway)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Go on."}], "max_tokens": 400}
    url = f"http://{gateway.address}/v1/chat/completions"
    with httpx.Client(trust_env=False, timeout=60) as client:
        with client.stream("POST", url, json=body | {"stream": True, "ignore_eos": True, "n": 8}) as held:
            assert held.status_code == 200
            refused = client.post(url, json=body)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["type"] == "rate_limit_error"
        wait_until(lambda: metric(gateway.metrics, "foundry_gateway_completions_in_flight") == 0, gateway)
        assert client.post(url, json=body | {"max_tokens": 1}).status_code == 200


def test_a_server_that_dies_is_replaced_or_waited_for(site: Site) -> None:
    other = site.stack.rollout()
    wait_serving(other)
    # Looked at once only: the gateways learn of the death by the request that meets it.
    both = site.stack.gateway([site.rollout, other], "--poll-seconds", "3600")
    alone = site.stack.gateway([other], "--poll-seconds", "3600", "--retry-timeout-seconds", "60")
    wait_ready(both)
    wait_ready(alone)
    assert metric(both.metrics, "foundry_gateway_rollouts_reachable") == 2

    options: dict[str, Any] = {"max_tokens": 4, "temperature": 0}
    with FoundryClient(f"http://{both.address}") as client:
        for seed in range(100, 120):
            # Until one belongs to the server that will die.
            (manifest,) = site.stack.publish(f"moved-{seed}", site.stack.cartridge(seed))
            before = client.chat(f"moved-{seed}", "Where?", **options)
            if manifest.digest in resident(other):
                break
        assert manifest.digest in resident(other)
        assert manifest.digest not in resident(site.rollout)
        other.kill()
        assert client.chat(f"moved-{seed}", "Where?", **options).text == before.text
    assert manifest.digest in resident(site.rollout)
    assert metric(both.metrics, "foundry_gateway_rollout_retries_total") == 1

    with FoundryClient(f"http://{alone.address}") as client, ThreadPoolExecutor() as pool:
        asking = pool.submit(client.chat, f"moved-{seed}", "Where?", **options)
        wait_until(lambda: metric(alone.metrics, "foundry_gateway_rollout_retries_total") > 0, alone)
        assert "no rollout server" in get(alone, "/readyz").json()["reasons"]["rollouts"]
        other.start()
        assert asking.result(timeout=60).text == before.text


def test_resident_cartridges_are_served_without_redis(site: Site) -> None:
    site.stack.publish("survivor", site.stack.cartridge(30))
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
    before = site.client.chat("survivor@latest", "Still there?", **options)
    site.stack.valkey.kill()
    try:
        for reference in ("survivor@latest", "survivor@1"):
            answer = site.client.chat(reference, "Still there?", **options)
            assert (answer.text, answer.cartridges) == (before.text, before.cartridges)
        assert site.client.chat("tiny", "And you?", max_tokens=2).model_fingerprint == before.model_fingerprint
        assert list(site.client.ready()["reasons"]) == ["store"]
        assert site.http("GET", "/readyz?exclude=store").status_code == 200
        with pytest.raises(StoreUnavailable):
            site.client.runs.create(**specification(text=DOCUMENT))
    finally:
        asyncio.run(site.stack.valkey.start())
    wait_ready(site.gateway)
    assert site.client.chat("survivor@latest", "Still there?", **options).text == before.text


def test_sigterm_ends_the_gateway_in_order(site: Site) -> None:
    gateway = site.stack.gateway([site.rollout])
    wait_ready(gateway)
    gateway.stop()
    assert "Traceback" not in gateway.log.read_text()
