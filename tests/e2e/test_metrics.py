"""What live services serve on /metrics is what docs/metrics.md says, with few labels, and it moves with the work."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from docs import make_metrics
from foundry.errors import BY_REASON, PortTaken
from foundry.store import CartridgeStore
from foundry.store.api_keys import KeyLimits
from foundry.telemetry.metrics import serve_metrics
from services.rollout import engine_metrics
from tests.e2e.training import STEPS, create_run, step_events
from tests.process import Process
from tests.services import Stack, get, open_stack, openai_client, wait_ready, wait_serving, wait_until

SERVICES = ("gateway", "rollout", "teacher", "trainer")
# Of the client library.
OTHERS = re.compile(r"(process|python)_\w+")
WORDS = {
    "service": set(SERVICES),
    "engine": {"0", "torch", "vllm", "tokasaurus"},
    "model_name": {"tiny"},
    "finished_reason": {"stop", "length", "error", "abort"},
    "tier": {"device", "host", "disk", "store", "hot", "durable"},
    "result": {"loaded", "resident", "dropped", "failed", "hit", "miss", "absent"},
    "state": {"idle", "running", "paused", "waiting", "queued", "held"},
    "end": {"succeeded", "failed", "cancelled", "fenced", "requeued"},
    "stage": {
        *("rollout", "teacher", "update", "publish", "total", "evaluate", "checkpoint"),
        *("send", "hash", "durable", "commit", "receive", "verify"),
    },
    "operation": {"publish", "fetch", "read", "write"},
    "direction": {"sent", "received"},
    "durable": {"true", "false"},
    "reason": {*BY_REASON, "INTERNAL", "full", "slow"},
    "limit": set(KeyLimits.model_fields),
    "kind": {"api_key", "cartridge", "document", "grant", "manifest", "mark", "pointer", "run", "tag"},
    "outcome": {"created", "existed", "deleted", "failed", "refused", "error"},
    "tracker": {"json", "tensorboard", "wandb", "trackio"},
    "call": {"rollout", "teacher", "store"},
    "method": {"GET", "POST", "other", "Generate", "GenerateBatch", "Resident", "PutContext", "Score", "Status"},
    "code": {code.name for code in grpc.StatusCode},
}
FREE = {"version": r"[0-9.]+", "status": r"[1-5][0-9][0-9]", "route": r"unmatched|/[a-z0-9/_{}]*"}


@dataclass
class Site:
    stack: Stack
    processes: dict[str, Process]

    @property
    def gateway(self) -> Process:
        return self.processes["gateway"]

    def scrape(self, service: str) -> dict[str, Metric]:
        answer = httpx.get(f"http://{self.processes[service].metrics}/metrics", trust_env=False)
        assert answer.headers["content-type"].startswith("text/plain; version=")
        return {family.name: family for family in text_string_to_metric_families(answer.text)}

    def value(self, service: str, name: str, **labels: str) -> float:
        found = [
            sample.value
            for family in self.scrape(service).values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert found, (service, name, labels)
        return sum(found)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_stack(tmp_path_factory.mktemp("metrics")) as stack:
        rollout = stack.rollout()
        teacher = stack.spawn("teacher", "--model", str(stack.model))
        trainer = stack.spawn(
            *("trainer", "--model", str(stack.model), "--rollout-addresses", rollout.address),
            *("--teacher-address", teacher.address),
        )
        gateway = stack.gateway([rollout], "--census-seconds", "0.2")
        for process in (rollout, teacher, trainer):
            wait_serving(process)
        wait_ready(gateway)
        site = Site(stack, {"gateway": gateway, "rollout": rollout, "teacher": teacher, "trainer": trainer})
        asyncio.run(_train(stack))
        with openai_client(gateway) as client:
            client.completions.create(model="trained", prompt="The harbour", max_tokens=4)
        httpx.request("BREW", f"http://{gateway.address}/tea", trust_env=False)
        yield site


async def _train(stack: Stack) -> None:
    store = await CartridgeStore.open(stack.settings)
    try:
        async for _ in step_events(store, await create_run(store, "trained")):
            pass
    finally:
        await store.close()


def families_served(site: Site, service: str) -> set[str]:
    """Names as the page has them. The parser takes `_total` off; of what it can't see as a family there is none."""
    return {
        f"{name}_total" if family.type == "counter" else name
        for name, family in site.scrape(service).items()
        if not OTHERS.fullmatch(name)
    }


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_serves_what_the_page_lists_and_nothing_else(site: Site, service: str) -> None:
    page = make_metrics.PAGE.read_text()
    served = families_served(site, service)
    assert served == make_metrics.served_by(service)
    assert [name for name in sorted(served) if f"| `{name}` |" not in page] == []


def test_every_step_is_a_line_of_json(site: Site) -> None:
    (file,) = site.stack.directory.glob("tracking/run-*.jsonl")

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in file.read_text().splitlines()]

    wait_until(lambda: lines()[-1]["type"] == "finished", site.processes["trainer"])
    steps = [line for line in lines() if line["type"] == "step"]
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    told = {event["step"]: event for event in asyncio.run(_told(site.stack, file.stem)) if event["type"] == "step"}
    assert [{name: value for name, value in step.items() if name != "time"} for step in steps] == list(told.values())


async def _told(stack: Stack, run_id: str) -> list[dict[str, Any]]:
    store = await CartridgeStore.open(stack.settings)
    try:
        return [event async for _, event in store.runs.events(run_id)]
    finally:
        await store.close()


def test_who_may_call_the_gateway_reads_no_counts_there(site: Site) -> None:
    assert get(site.gateway, "/metrics").status_code == 404


@pytest.mark.parametrize("service", SERVICES)
def test_labels_are_words_that_are_known_beforehand(site: Site, service: str) -> None:
    strange = [
        (sample.name, label, value)
        for family in site.scrape(service).values()
        for sample in family.samples
        if not OTHERS.fullmatch(family.name)
        for label, value in sample.labels.items()
        if label not in ("le", "quantile")
        if not (value in WORDS[label] if label in WORDS else re.fullmatch(FREE[label], value))
    ]
    assert strange == []


def test_what_a_run_did_is_counted(site: Site) -> None:
    assert site.value("trainer", "foundry_trainer_step") == STEPS
    assert site.value("trainer", "foundry_trainer_num_steps") == STEPS
    assert site.value("trainer", "foundry_trainer_stage_seconds_count", stage="update") == STEPS
    assert site.value("trainer", "foundry_trainer_stage_seconds_count", stage="checkpoint") > 0
    assert site.value("trainer", "foundry_trainer_answers_total") == 3 * STEPS
    assert site.value("trainer", "foundry_trainer_staleness_versions") == 0
    assert site.value("trainer", "foundry_trainer_version") == STEPS + 1
    assert site.value("trainer", "foundry_trainer_runs_total", end="succeeded") == 1
    assert site.value("trainer", "foundry_trainer_refused_total", reason="POLICY_MISMATCH") == 0
    threshold = site.value("trainer", "foundry_trainer_policy_mismatch_threshold")
    assert 0 <= site.value("trainer", "foundry_trainer_policy_mismatch_kl") < threshold == 1e-5
    wait_until(lambda: site.value("trainer", "foundry_trainer_run_state", state="idle") == 1, site.gateway)
    assert site.value("trainer", "foundry_trainer_run_state") == 1
    assert site.value("teacher", "foundry_teacher_scored_answers_total") > 3 * STEPS
    assert site.value("teacher", "foundry_teacher_context_requests_total", result="miss") == 1
    tokens = site.value("trainer", "foundry_trainer_tokens_total")
    assert site.value("rollout", "vllm:generation_tokens_total", model_name="tiny") > tokens > 0


def test_the_store_says_what_it_moved_and_what_it_holds(site: Site) -> None:
    published = site.value("trainer", "foundry_store_versions_published_total")
    assert published == STEPS + 1
    for stage in ("send", "hash", "commit", "total"):
        assert site.value("trainer", "foundry_store_stage_seconds_count", operation="publish", stage=stage) >= published
    for stage in ("receive", "hash", "verify", "total"):
        assert site.value("rollout", "foundry_store_stage_seconds_count", operation="fetch", stage=stage) > 0
    assert site.value("rollout", "foundry_store_bytes_total", direction="received", tier="hot") > 0
    for service in ("gateway", "rollout", "trainer"):
        assert site.value(service, "foundry_store_redis_up") == 1
        assert site.value(service, "foundry_store_redis_seconds_count") > 0
    manifests = site.stack.with_store(lambda store: store.versions("trained"))
    hot = site.stack.with_store(lambda store: store.hot_versions("trained"))
    num_bytes = {each.digest: each.header.num_bytes for each in manifests if each.version in hot}
    wait_until(lambda: site.value("gateway", "foundry_store_hot_versions") == len(hot), site.gateway)
    assert site.value("gateway", "foundry_store_names") == 1
    assert site.value("gateway", "foundry_store_hot_bytes") == sum(num_bytes.values())
    blobs = site.stack.directory.glob("objects/blobs/blake3/*.safetensors")
    assert site.value("gateway", "foundry_store_durable_bytes") == sum(blob.stat().st_size for blob in blobs) > 0
    assert site.value("gateway", "foundry_store_durable_versions") == 2
    assert site.value("gateway", "foundry_store_redis_used_bytes") > 0


def test_the_gateway_counts_errors_by_type(site: Site) -> None:
    before = site.value("gateway", "foundry_gateway_errors_total", reason="NOT_FOUND")
    httpx.get(f"http://{site.gateway.address}/nowhere", trust_env=False)
    assert site.value("gateway", "foundry_gateway_errors_total", reason="NOT_FOUND") == before + 1
    assert site.value("gateway", "foundry_gateway_requests_total", method="other") == 1


def test_a_service_that_is_starting_can_be_scraped(site: Site) -> None:
    # A model that is not there: it is never through with starting, but has served its metrics by then.
    process = site.stack.spawn("teacher", "--model", str(site.stack.model), module="tests.e2e.never_loads")
    site.processes["starting"] = process
    wait_until(lambda: "foundry_build_info" in site.scrape("starting"), process)


def test_a_port_that_is_taken_is_a_typed_error(site: Site) -> None:
    with pytest.raises(PortTaken):
        serve_metrics("teacher", int(site.processes["teacher"].metrics.rpartition(":")[2]))


def test_vllm_buckets() -> None:
    """Of `vllm/v1/metrics/loggers.py`; a panel's quantile needs the same bounds on every server."""
    bounds = {
        metric._name: metric._kwargs["buckets"]
        for metric in make_metrics.metrics_of(engine_metrics)
        if metric._type == "histogram"
    }
    first = "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
    token = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80"
    request = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
    expected = {"vllm:time_to_first_token_seconds": first, "vllm:inter_token_latency_seconds": token} | dict.fromkeys(
        (
            "vllm:e2e_request_latency_seconds",
            *(f"vllm:request_{phase}_time_seconds" for phase in ("queue", "prefill", "decode")),
        ),
        request,
    )
    for name, text in expected.items():
        assert tuple(bounds.pop(name)) == tuple(map(float, text.split())), name
    assert bounds.pop("vllm:iteration_tokens_total") == (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    for name in ("vllm:request_prompt_tokens", "vllm:request_generation_tokens"):
        assert bounds.pop(name)[:8] == (1, 2, 5, 10, 20, 50, 100, 200)
    assert bounds == {}
