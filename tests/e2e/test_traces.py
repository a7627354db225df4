"""One trace for each training step, through trainer, rollout, teacher and store; the same ids stand in the logs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from foundry.client import FoundryClient
from foundry.store import CartridgeStore
from tests.collector import Collector, Span, open_collector
from tests.e2e.training import DOCUMENT, STEPS, step_events
from tests.process import Process
from tests.services import Stack, open_stack, wait_ready, wait_serving

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@dataclass
class Site:
    collector: Collector
    processes: dict[str, Process]
    run_id: str
    answers: list[httpx.Response]

    def lines(self, service: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.processes[service].log.read_text().splitlines()]

    def trace_of_step(self, step: int) -> list[Span]:
        roots = [
            span for span in self.collector.spans if span.name == "step" and span.attributes["foundry.step"] == step
        ]
        assert len(roots) == 1
        return [span for span in self.collector.spans if span.trace_id == roots[0].trace_id]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_collector() as (collector, endpoint), open_stack(tmp_path_factory.mktemp("traces")) as stack:
        traced = ("--otlp-endpoint", endpoint)
        rollout = stack.rollout(*traced)
        teacher = stack.spawn("teacher", "--model", str(stack.model), *traced)
        trainer = stack.spawn(
            *("trainer", "--model", str(stack.model), "--rollout-addresses", rollout.address),
            *("--teacher-address", teacher.address, *traced),
        )
        gateway = stack.gateway([rollout], "--retry-timeout-seconds", "0", *traced)
        for process in (rollout, teacher, trainer):
            wait_serving(process)
        wait_ready(gateway)
        run_id = _train(stack, gateway)
        answers = [_complete(gateway, "trained"), _complete(gateway, "nobody")]
        # What is kept back is sent when a service stops.
        rollout.stop()
        answers.append(_complete(gateway, "trained"))
        for process in (gateway, trainer, teacher):
            process.stop()
        processes = {"gateway": gateway, "trainer": trainer, "rollout": rollout, "teacher": teacher}
        yield Site(collector, processes, run_id, answers)


def _complete(gateway: Process, model: str) -> httpx.Response:
    return httpx.post(
        f"http://{gateway.address}/v1/completions",
        json={"model": model, "prompt": "The harbour", "max_tokens": 4},
        headers={"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01", "x-request-id": "mine"},
        trust_env=False,
        timeout=60,
    )


def _train(stack: Stack, gateway: Process) -> str:
    with FoundryClient(f"http://{gateway.address}") as client:
        prompts = "\n".join(
            json.dumps({"prompt": f"What is {thing}?"}) for thing in ("open", "signed", "twelve", "old")
        )
        run = client.runs.create(
            name="trained",
            text=DOCUMENT,
            mode="on",
            num_tokens=20,
            num_steps=STEPS,
            batch_size=3,
            max_new_tokens=10,
            prompts={"kind": "document", "digest": client.documents.create(prompts)["digest"]},
        )

    async def follow(store: CartridgeStore) -> None:
        async for _ in step_events(store, run["id"]):
            pass

    stack.with_store(follow)
    return str(run["id"])


def below(spans: list[Span], span: Span) -> set[str]:
    """`service: name` of a span and of all spans above it."""
    by_id = {each.span_id: each for each in spans}
    found = set()
    above: Span | None = span
    while above is not None:
        found.add(f"{above.service}: {above.name}")
        above = by_id.get(above.parent_id)
    return found


@pytest.mark.parametrize("step", [1, STEPS])
def test_a_step_is_one_trace_through_all_services(site: Site, step: int) -> None:
    spans = site.trace_of_step(step)
    paths = [below(spans, span) for span in spans]
    for path in (
        {"trainer: step", "trainer: prompts"},
        {"trainer: step", "trainer: rollout", "rollout: GenerateBatch", "rollout: cartridges"},
        {"trainer: step", "trainer: teacher", "teacher: Score"},
        {"trainer: step", "trainer: update"},
        {"trainer: step", "trainer: publish", "trainer: store.publish"},
    ):
        assert path in paths, path
    assert all("trainer: step" in path for path in paths)
    root = next(span for span in spans if span.name == "step")
    assert root.attributes["foundry.run"] == site.run_id
    assert root.attributes["foundry.attempt"] == 1
    assert not any(span.failed for span in spans)


def test_versions_are_fetched_in_the_trace_that_published_or_asked_for_them(site: Site) -> None:
    fetches = [span for span in site.collector.spans if (span.service, span.name) == ("rollout", "store.fetch")]
    published = {
        span.attributes["foundry.digest"]: span.trace_id
        for span in site.collector.spans
        if span.name == "store.publish"
    }
    assert fetches
    in_step = [fetch for fetch in fetches if fetch.trace_id == published[fetch.attributes["foundry.digest"]]]
    assert in_step
    steps = {step: {span.span_id for span in site.trace_of_step(step)} for step in range(1, STEPS + 1)}
    assert all(any(fetch.span_id in ids for ids in steps.values()) for fetch in in_step)


def test_every_step_links_to_the_request_that_made_the_run(site: Site) -> None:
    (created,) = [span for span in site.collector.spans if span.name == "POST /v1/runs"]
    assert created.service == "gateway"
    assert created.attributes["http.response.status_code"] == 201
    steps = [span for span in site.collector.spans if span.name == "step"]
    assert [span.links for span in steps] == [((created.trace_id, created.span_id),)] * STEPS
    assert created.trace_id not in {span.trace_id for span in steps}


def test_a_client_s_trace_goes_on_to_the_rollout_server(site: Site) -> None:
    spans = [span for span in site.collector.spans if span.trace_id == TRACE_ID]
    served = [span for span in spans if span.name == "POST /v1/completions"]
    assert [span.parent_id for span in served] == [SPAN_ID] * 3
    assert {"gateway: POST /v1/completions", "rollout: Generate"} in [below(spans, span) for span in spans]
    assert sorted(span.attributes["http.response.status_code"] for span in served) == [200, 404, 503]


def test_regular_looks_are_not_traced(site: Site) -> None:
    names = {span.name for span in site.collector.spans}
    assert not [name for name in names if name in ("Resident", "Check", "Watch") or "readyz" in name]


def test_every_line_of_every_log_is_a_json_object(site: Site) -> None:
    for service in site.processes:
        lines = site.lines(service)
        assert lines
        for line in lines:
            assert line["service"] == service
            assert {"event", "level", "timestamp", "logger"} <= line.keys()


def test_a_step_s_lines_carry_its_trace_and_its_run_in_all_services(site: Site) -> None:
    events = {"trainer": "step", "rollout": "batch answered", "teacher": "scored"}
    for step in (1, STEPS):
        trace_id = site.trace_of_step(step)[0].trace_id
        for service, event in events.items():
            found = [line for line in site.lines(service) if line.get("trace_id") == trace_id]
            assert event in {line["event"] for line in found}, (service, step)
            assert {line["run"] for line in found if line["event"] == event} == {site.run_id}
            assert all(len(line["span_id"]) == 16 for line in found)
    told = [line for line in site.lines("trainer") if line["event"] == "step"]
    assert [line["step"] for line in told] == list(range(1, STEPS + 1))
    answered = [line for line in site.lines("rollout") if line["event"] == "batch answered" and "digest" in line]
    assert [line["digest"] for line in answered][1:] == [line["digest"] for line in told][:-1]
    assert [line["version"] for line in answered][1:] == [line["version"] for line in told][:-1]


def test_a_request_s_lines_carry_its_id(site: Site) -> None:
    whole, unknown, failed = site.answers
    assert whole.headers["x-request-id"] == whole.json()["id"]
    assert unknown.headers["x-request-id"] == "mine"
    (line,) = [line for line in site.lines("gateway") if line["event"] == "request failed"]
    assert line["request_id"] == failed.headers["x-request-id"]
    assert line["trace_id"] == TRACE_ID
    assert line["reason"] == "UNAVAILABLE"
