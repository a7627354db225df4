"""Documents, cartridges, runs and operations of the gateway, through the SDK and plain HTTP, on real services."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import httpx
import pytest

from foundry.client import FoundryClient
from foundry.errors import (
    CartridgeNotFound,
    CartridgeTooLong,
    Conflict,
    DocumentNotFound,
    DocumentTooLong,
    DocumentUnreadable,
    FingerprintMismatch,
    InvalidArgument,
    RunNotFound,
    StoreUnavailable,
    Unavailable,
)
from foundry.identity import content_digest
from foundry.store import CartridgeStore, RunState
from tests.services import (
    Process,
    Stack,
    get,
    metric,
    open_stack,
    resident,
    wait_ready,
    wait_serving,
    wait_until,
)

DOCUMENT = "The treaty was signed in the spring. " * 8


@dataclass
class Site:
    stack: Stack
    rollout: Process
    rollout_metrics: str
    gateway: Process
    client: FoundryClient

    def http(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        return httpx.request(method, f"http://{self.gateway.address}{path}", trust_env=False, timeout=60, **arguments)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_stack(tmp_path_factory.mktemp("gateway")) as stack:
        metrics_port = stack.free_port()
        rollout = stack.rollout("--metrics-port", str(metrics_port))
        teacher = stack.spawn("teacher", "--model", str(stack.model), "--reserve-tokens", "128")
        gateway = stack.gateway([rollout], "--teacher-address", teacher.address, "--retry-timeout-seconds", "2")
        wait_serving(rollout)
        wait_serving(teacher)
        wait_ready(gateway)
        with FoundryClient(f"http://{gateway.address}") as client:
            yield Site(stack, rollout, f"127.0.0.1:{metrics_port}", gateway, client)


def specification(**changes: Any) -> dict[str, Any]:
    prompts = {"kind": "selfstudy", "num_prompts": 4}
    return {"name": "handbook", "num_tokens": 16, "num_steps": 2, "max_new_tokens": 8, "prompts": prompts} | changes


# Documents


def test_a_document_is_kept_under_its_digest(site: Site) -> None:
    card = site.client.documents.create(DOCUMENT, title="The treaty")
    assert card["digest"] == content_digest(DOCUMENT.encode())
    assert (card["title"], card["num_bytes"]) == ("The treaty", len(DOCUMENT))
    assert site.client.documents.get(card["digest"]) == card
    assert card in site.client.documents.list()
    assert site.client.documents.text(card["digest"]) == DOCUMENT
    answer = site.http("POST", "/v1/documents", json={"text": DOCUMENT, "title": "Another title"})
    assert (answer.status_code, answer.json()) == (201, card)


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe", b"a\0b"])
def test_what_is_no_text_is_refused(site: Site, content: bytes) -> None:
    with pytest.raises(DocumentUnreadable) as raised:
        site.client.documents.create(content)
    assert raised.value.field == "text"


def test_a_document_larger_than_the_store_takes_is_refused(site: Site) -> None:
    with pytest.raises(DocumentTooLong):
        site.client.documents.create("a" * 100_001)
    answer = site.http("POST", "/v1/documents", json={"text": "a" * 100_001})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "DOCUMENT_TOO_LONG"
    assert site.client.documents.create("a" * 100_000)["num_bytes"] == 100_000


def test_a_body_beyond_the_limit_is_never_held(site: Site) -> None:
    before = site.gateway.peak_bytes()
    num_bytes = 256 * 2**20
    for content in ((b"a" * 2**20 for _ in range(num_bytes // 2**20)), b"a" * 2**22):
        answer = site.http("POST", "/v1/documents", content=content, headers={"content-type": "text/plain"})
        assert answer.status_code == 413
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert site.gateway.peak_bytes() - before < num_bytes / 8
    big = {"model": "tiny", "messages": [{"role": "user", "content": "a" * 2**22}]}
    assert site.http("POST", "/v1/chat/completions", json=big).status_code == 413


def test_unknown_documents_are_not_found(site: Site) -> None:
    with pytest.raises(DocumentNotFound):
        site.client.documents.get("blake3:" + "0" * 64)
    with pytest.raises(InvalidArgument):
        site.client.documents.get("nonsense")


# Cartridges


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


# Runs


def test_a_run_is_queued_with_its_document(site: Site) -> None:
    created = site.client.runs.create(**specification(text=DOCUMENT, title="Inline"))
    assert created["state"] == "queued"
    assert created["spec"]["document"] == content_digest(DOCUMENT.encode())
    assert site.client.documents.text(created["spec"]["document"]) == DOCUMENT
    assert site.client.runs.get(created["id"]) == created
    again = site.client.runs.create(**specification(document=created["spec"]["document"]))
    assert [run["id"] for run in site.client.runs.list()][:2] == [again["id"], created["id"]]
    for run in (created, again):
        assert site.client.runs.cancel(run["id"])["state"] == "cancelled"


@pytest.mark.parametrize(
    ("changes", "kind", "field"),
    [
        ({"text": DOCUMENT, "num_tokens": 0}, InvalidArgument, "num_tokens"),
        ({"text": DOCUMENT, "objective": "mse"}, InvalidArgument, "objective"),
        ({"text": DOCUMENT, "learning_rat": 1}, InvalidArgument, "learning_rat"),
        ({"text": DOCUMENT, "name": "Not A Name"}, InvalidArgument, "name"),
        ({"text": DOCUMENT, "prompts": {"kind": "oracle"}}, InvalidArgument, "prompts.kind"),
        ({"text": DOCUMENT, "document": "blake3:" + "0" * 64}, InvalidArgument, "text"),
        ({"text": 5}, InvalidArgument, "text"),
        ({}, InvalidArgument, "document"),
        ({"document": "blake3:" + "0" * 64}, DocumentNotFound, "document"),
        ({"text": ""}, DocumentUnreadable, "document"),
        (
            {"text": DOCUMENT, "prompts": {"kind": "document", "digest": "blake3:" + "1" * 64}},
            DocumentNotFound,
            "prompts.digest",
        ),
        ({"text": DOCUMENT, "model_fingerprint": "blake3:" + "2" * 64}, FingerprintMismatch, "model_fingerprint"),
        ({"text": DOCUMENT, "max_new_tokens": 5000}, InvalidArgument, "max_new_tokens"),
        ({"text": "Short text.", "num_tokens": 64}, CartridgeTooLong, "num_tokens"),
        ({"text": "x" * 2000}, DocumentTooLong, "document"),
    ],
)
def test_an_impossible_run_is_refused_at_once(
    site: Site, changes: dict[str, Any], kind: type[Exception], field: str
) -> None:
    before = len(site.client.runs.list())
    with pytest.raises(kind) as raised:
        site.client.runs.create(**specification(**changes))
    assert raised.type is kind
    assert getattr(raised.value, "field", None) == field
    assert len(site.client.runs.list()) == before


def test_events_follow_a_run_to_its_end_and_can_be_resumed(site: Site) -> None:
    run_id = site.client.runs.create(**specification(text=DOCUMENT))["id"]
    events = site.client.runs.events(run_id)
    queued = next(events)
    assert (queued["type"], queued["state"]) == ("state", "queued")

    async def work(store: CartridgeStore) -> None:
        claimed = await store.runs.claim("worker", 60.0, timeout_seconds=5)
        assert claimed is not None
        assert claimed.run_id == run_id
        await store.runs.report(run_id, claimed.attempt, {"type": "step", "step": 1, "loss": 0.5})
        await store.runs.report(run_id, claimed.attempt, {"type": "step", "step": 2, "note": "\u2028é"})

    site.stack.with_store(work)
    # The stream was open before any of this was reported.
    running, one, two = islice(events, 3)
    assert (running["state"], one["step"], one["loss"], two["note"]) == ("running", 1, 0.5, "\u2028é")
    assert site.client.runs.get(run_id)["last_event"]["step"] == 2

    async def finish(store: CartridgeStore) -> None:
        await store.runs.finish(run_id, 1, RunState.SUCCEEDED, result={"version": 2})

    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(site.client.runs.wait, run_id)
        site.stack.with_store(finish)
        assert waiting.result(timeout=30)["state"] == "succeeded"
    finished = list(events)
    assert [(event["type"], event["state"], event["result"]) for event in finished] == [
        ("finished", "succeeded", {"version": 2})
    ]
    resumed = list(site.client.runs.events(run_id, after=one["id"]))
    assert [event["id"] for event in resumed] == [two["id"], finished[0]["id"]]


def test_the_event_stream_is_server_sent_events(site: Site) -> None:
    run_id = site.client.runs.create(**specification(text=DOCUMENT))["id"]
    site.client.runs.cancel(run_id)
    answer = site.http("GET", f"/v1/runs/{run_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [dict(line.split(": ", 1) for line in block.split("\n")) for block in answer.text.strip().split("\n\n")]
    assert all(set(block) == {"id", "data"} for block in blocks)
    assert json.loads(blocks[-1]["data"])["state"] == "cancelled"
    later = site.http("GET", f"/v1/runs/{run_id}/events", headers={"last-event-id": blocks[-2]["id"]})
    assert later.text.strip().split("\n\n") == [answer.text.strip().split("\n\n")[-1]]
    for path, headers, status in (
        (f"/v1/runs/{run_id}/events", {"last-event-id": "yesterday"}, 400),
        ("/v1/runs/run-aaaaaaaa/events", {}, 404),
    ):
        refused = site.http("GET", path, headers=headers)
        assert (refused.status_code, refused.json()["error"]["type"]) == (status, "invalid_request_error")


def test_runs_are_paused_resumed_and_cancelled(site: Site) -> None:
    runs = site.client.runs
    run_id = runs.create(**specification(text=DOCUMENT))["id"]
    assert runs.pause(run_id)["state"] == "paused"
    assert runs.resume(run_id)["state"] == "queued"
    assert runs.cancel(run_id)["state"] == "cancelled"
    with pytest.raises(Conflict):
        runs.pause(run_id)
    for unknown in (runs.get, runs.cancel, runs.pause, runs.resume):
        with pytest.raises(RunNotFound):
            unknown("run-aaaaaaaa")


# Answers through the SDK


def test_the_sdk_answers_with_identity_usage_and_times(site: Site) -> None:
    (manifest,) = site.stack.publish("sdk", site.stack.cartridge(5))
    options: dict[str, Any] = {"temperature": 1.0, "seed": 9, "max_tokens": 20, "ignore_eos": True}
    answer = site.client.chat("sdk@latest", "What is it?", **options)
    assert [(str(used), used.digest) for used in answer.cartridges] == [("sdk@1", manifest.digest)]
    assert answer.model_fingerprint == site.stack.lm.spec.fingerprint
    assert (answer.completion_tokens, answer.cartridge_tokens, answer.finish_reason) == (20, 12, "length")
    assert 0 < answer.seconds_to_first_token <= answer.seconds
    stream = site.client.stream_chat("sdk@1", [{"role": "user", "content": "What is it?"}], **options)
    assert "".join(stream) == answer.text
    assert stream.answer is not None
    assert stream.answer.cartridges == answer.cartridges
    with pytest.raises(CartridgeNotFound):
        site.client.chat("sdk@9", "What is it?")
    with pytest.raises(InvalidArgument) as raised:
        site.client.chat("sdk", "What is it?", temperature=9)
    assert raised.value.field == "temperature"


def test_a_client_that_leaves_ends_the_generation(site: Site) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Go on."}], "ignore_eos": True}
    num_tokens, num_choices = 400, 8

    def generated() -> float:
        return metric(site.rollout_metrics, "foundry_generation_tokens_total")

    def idle() -> bool:
        running = metric(site.rollout_metrics, "foundry_num_requests_running")
        return running == metric(site.gateway.address, "foundry_gateway_completions_in_flight") == 0

    for stream in (True, False):
        wait_until(idle, site.gateway)
        before = generated()
        asked = body | {"stream": stream, "n": num_choices, "max_tokens": num_tokens}
        request = json.dumps(asked).encode()

        async def leave(request: bytes = request, before: float = before) -> None:
            host, _, port = site.gateway.address.rpartition(":")
            _, writer = await asyncio.open_connection(host, int(port))
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            writer.write(f"{head}content-length: {len(request)}\r\n\r\n".encode() + request)
            await writer.drain()
            while await asyncio.to_thread(generated) == before:
                pass
            writer.close()
            await writer.wait_closed()

        asyncio.run(leave())
        wait_until(idle, site.gateway)
        assert 0 < generated() - before < num_tokens * num_choices


# Operations


def test_health_and_readiness(site: Site) -> None:
    assert site.http("GET", "/healthz").json() == {"status": "ok"}
    assert site.client.ready() == {"status": "ok", "reasons": {}}


def test_metrics_count_by_route_template(site: Site) -> None:
    def count(**labels: str) -> float:
        return metric(site.gateway.address, "foundry_gateway_requests_total", **labels)

    template = "/v1/documents/{digest}"
    before = count(route=template, status="404")
    site.http("GET", "/v1/documents/blake3:" + "a" * 64)
    assert count(route=template, status="404") == before + 1
    tokens = metric(site.gateway.address, "foundry_gateway_generation_tokens_total")
    answer = site.client.chat("tiny", "How?", max_tokens=7, ignore_eos=True)
    assert answer.completion_tokens == 7
    assert metric(site.gateway.address, "foundry_gateway_generation_tokens_total") == tokens + 7
    assert metric(site.gateway.address, "foundry_gateway_time_to_first_token_seconds_count") > 0


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
        ("POST", "/v1/documents", {"content": b"{}", "headers": {"content-type": "application/xml"}}, 400),
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


# Faults


def test_too_many_requests_are_refused_with_a_time_to_come_back(site: Site) -> None:
    gateway = site.stack.gateway([site.rollout], "--max-concurrent-requests", "1")
    wait_ready(gateway)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Go on."}], "max_tokens": 400}
    url = f"http://{gateway.address}/v1/chat/completions"
    with httpx.Client(trust_env=False, timeout=60) as client:
        with client.stream("POST", url, json=body | {"stream": True, "ignore_eos": True}) as held:
            assert held.status_code == 200
            refused = client.post(url, json=body)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["type"] == "rate_limit_error"
        wait_until(lambda: metric(gateway.address, "foundry_gateway_completions_in_flight") == 0, gateway)
        assert client.post(url, json=body | {"max_tokens": 1}).status_code == 200


def test_a_server_that_dies_is_replaced_or_waited_for(site: Site) -> None:
    other = site.stack.rollout()
    wait_serving(other)
    # Looked at once only: the gateways learn of the death by the request that meets it.
    both = site.stack.gateway([site.rollout, other], "--poll-seconds", "3600")
    alone = site.stack.gateway([other], "--poll-seconds", "3600", "--retry-timeout-seconds", "60")
    wait_ready(both)
    wait_ready(alone)
    assert metric(both.address, "foundry_gateway_rollouts_reachable") == 2

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
    assert metric(both.address, "foundry_gateway_rollout_retries_total") == 1

    with FoundryClient(f"http://{alone.address}") as client, ThreadPoolExecutor() as pool:
        asking = pool.submit(client.chat, f"moved-{seed}", "Where?", **options)
        wait_until(lambda: metric(alone.address, "foundry_gateway_rollout_retries_total") > 0, alone)
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
