"""Every query of every dashboard and every rule, asked of a Prometheus that has scraped a live stack.

Two of them: one labels targets as compose does, the other as the Prometheus operator does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import grpc
import openai
import pytest
import yaml
from redis import Redis

from foundry.rpc.channel import open_channel
from foundry.store import CartridgeStore
from foundry.v1 import common_pb2, rollout_pb2, rollout_pb2_grpc, teacher_pb2, teacher_pb2_grpc
from tests.deploy import promql
from tests.deploy.boards import BOARDS, QUERIES, Query, filled, one_of
from tests.deploy.prometheus import DIRECTORY, RULES, Prometheus, binary
from tests.e2e.training import create_run, follow
from tests.process import Process
from tests.services import Stack, open_stack, openai_client, wait_ready, wait_serving, wait_until

SCRAPE_SECONDS = 1
WAIT_SECONDS = 30.0
NAMESPACE = "models"
# There is no GPU here, and without one there are no series: docs/metrics.md. test_dashboards checks the names.
WITHOUT_GPU = {"foundry_gpu_memory_used_bytes", "foundry_gpu_memory_bytes", "foundry_gpu_utilization_ratio"}
STEPS = 12
T = TypeVar("T")


@dataclass
class Site:
    stack: Stack
    gateway: Process
    rollout: Process
    teacher: Process
    prometheus: dict[str, Prometheus]
    began: float = field(default_factory=time.time)

    def use(self) -> None:
        """What people do, right and wrong."""
        with openai_client(self.gateway) as client:
            client.completions.create(model="trained", prompt="The harbour is open", max_tokens=4)
            with suppress(openai.NotFoundError):
                client.completions.create(model="nobody", prompt="What?", max_tokens=4)
        asyncio.run(self._refused())

    async def _refused(self) -> None:
        absent = common_pb2.CartridgeId(name="absent", version=1, digest="blake3:" + "0" * 64)
        rollouts, teachers = open_channel(self.rollout.address), open_channel(self.teacher.address)
        rollout: rollout_pb2_grpc.RolloutAsyncStub = rollout_pb2_grpc.RolloutStub(rollouts)
        teacher: teacher_pb2_grpc.TeacherAsyncStub = teacher_pb2_grpc.TeacherStub(teachers)
        with suppress(grpc.aio.AioRpcError):
            await rollout.Generate(rollout_pb2.GenerateRequest(cartridges=[absent]), timeout=10).read()
        with suppress(grpc.aio.AioRpcError):
            await teacher.PutContext(teacher_pb2.PutContextRequest(), timeout=10)
        await rollouts.close()
        await teachers.close()

    def drawn(self, query: Query, style: str) -> list[float]:
        """The points of `query` from the beginning until now, as Grafana would ask for them."""
        server, until = self.prometheus[style], time.time()
        values = {
            # Its rule: a step and a scrape, and no fewer than four scrapes.
            "__rate_interval": f"{4 * SCRAPE_SECONDS}s",
            "__range": f"{until - self.began:.0f}s",
            **self.choices(query.board, style),
        }
        expression = filled(query.expression, values)
        return server.values(expression, since=self.began, until=until, step_seconds=SCRAPE_SECONDS)

    def choices(self, board: str, style: str) -> dict[str, str]:
        """All of each variable: as `All` where there are no namespaces, one by one where there are."""
        chosen: dict[str, str] = {}
        for variable in BOARDS[board]["templating"]["list"][1:]:
            listing, label = variable["query"]["query"].removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
            found = self.prometheus[style].label_values(filled(listing, chosen), label)
            chosen[variable["name"]] = one_of(found) if style == "operator" and found else variable["allValue"]
        return chosen


def configuration(processes: Mapping[str, Process], style: str) -> dict[str, Any]:
    """That of compose, with our addresses and faster; or the targets that the chart's PodMonitors make of them."""
    read: dict[str, Any] = yaml.safe_load((DIRECTORY / "prometheus.yml").read_text())
    every = f"{SCRAPE_SECONDS}s"
    read["global"] = {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every}
    read["rule_files"] = [str(DIRECTORY / file) for file in read["rule_files"]]
    for job in read["scrape_configs"]:
        service = job["job_name"]
        target: dict[str, Any] = {"targets": [processes[service].metrics]}
        if style == "operator":
            target["labels"] = {"namespace": NAMESPACE, "pod": f"release-{service}-0", "container": service}
            job["job_name"] = f"{NAMESPACE}/release-cartridge-foundry-{service}"
        del job["dns_sd_configs"]
        job["static_configs"] = [target]
    return read


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    binary("prometheus")
    directory = tmp_path_factory.mktemp("live")
    with open_stack(directory) as stack:
        # Without a limit there is no share of it.
        with Redis.from_url(stack.valkey.url) as redis:
            redis.config_set("maxmemory", 1 << 30)
        rollout = stack.rollout()
        # Until somebody has asked for it.
        rollout.freeze()
        gateway = stack.gateway([rollout], "--census-seconds", "0.5", "--retry-timeout-seconds", "0.1")
        teacher = stack.spawn(
            *("teacher", "--model", str(stack.model), "--disk-context-budget-bytes", str(1 << 30)),
            # From where the document comes back to the one that is started again.
            *("--disk-context-directory", str(directory / "contexts")),
        )
        trainer = stack.spawn(
            *("trainer", "--model", str(stack.model), "--rollout-addresses", rollout.address),
            *("--teacher-address", teacher.address),
        )
        processes = {"gateway": gateway, "rollout": rollout, "teacher": teacher, "trainer": trainer}
        servers: dict[str, Prometheus] = {}
        try:
            for style in ("compose", "operator"):
                servers[style] = Prometheus(directory / style, configuration(processes, style))
            wait_ready(gateway, "/healthz")
            site = Site(stack, gateway, rollout, teacher, servers)
            refused_while_starting(gateway)
            rollout.thaw()
            for process in (rollout, teacher, trainer):
                wait_serving(process)
            wait_ready(gateway)
            for server in servers.values():
                wait_until(server.is_ready, gateway)
                # A rate is of what comes after the first scrape.
                wait_until(partial(scrapes_all, server, len(processes)), gateway)
            asyncio.run(train(stack, teacher))
            yield site
        finally:
            for server in servers.values():
                server.close()


def scrapes_all(server: Prometheus, num_targets: int) -> bool:
    return len(server.ask("query", query="up == 1")["result"]) == num_targets


def refused_while_starting(gateway: Process) -> None:
    """A 5xx: no rollout server has loaded its model yet."""
    with openai_client(gateway) as client, pytest.raises(openai.InternalServerError):
        client.completions.create(model="tiny", prompt="What?", max_tokens=1)


async def train(stack: Stack, teacher: Process) -> None:
    """A run whose teacher dies on the way."""
    store = await CartridgeStore.open(stack.settings)
    try:
        run_id = await create_run(store, "trained", num_steps=STEPS, heldout_every=4)
        async for event in follow(store, run_id):
            if event["type"] == "step" and event["step"] == STEPS // 2:
                teacher.kill()
                teacher.start()
            if event["type"] == "finished":
                assert event["state"] == "succeeded", event
    finally:
        await store.close()


def until_none_is_left(site: Site, missing: list[T], holds: Callable[[T], object]) -> list[T]:
    """Those of `missing` for which `holds` has not become true while the site is used."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        site.use()
        missing = [each for each in missing if not holds(each)]
        if not missing or time.monotonic() > deadline:
            return missing


@pytest.mark.parametrize("style", ["compose", "operator"])
def test_no_query_is_empty(site: Site, style: str) -> None:
    queries = [query for query in QUERIES if not promql.metrics(query.expression) & WITHOUT_GPU]
    empty = until_none_is_left(site, queries, lambda query: site.drawn(query, style))
    assert [str(query) for query in empty] == []


@pytest.mark.parametrize("style", ["compose", "operator"])
def test_queries_of_gpus_are_right_and_empty(site: Site, style: str) -> None:
    queries = [query for query in QUERIES if promql.metrics(query.expression) & WITHOUT_GPU]
    assert {name for query in queries for name in promql.metrics(query.expression)} == WITHOUT_GPU
    # An error would be raised.
    assert [str(query) for query in queries if site.drawn(query, style)] == []


def test_variables_list_what_there_is(site: Site) -> None:
    for board, own in (("training", "trainer"), ("serving", "rollout")):
        assert site.choices(board, "compose") == {"namespace": ".*", "job": ".*", "instance": ".*"}
        assert site.choices(board, "operator")["namespace"] == NAMESPACE
        assert site.choices(board, "operator")["job"] == f"{NAMESPACE}/release-cartridge-foundry-{own}"
    assert site.choices("store-and-fleet", "operator")["job"].count("|") == 3


@pytest.mark.parametrize("style", ["compose", "operator"])
def test_every_rule_is_evaluated(site: Site, style: str) -> None:
    server = site.prometheus[style]
    expected = [rule.get("alert") or rule["record"] for group in groups() for rule in group["rules"]]
    wait_until(lambda: all(rule["health"] != "unknown" for rule in server.rules()), site.gateway)
    rules = server.rules()
    assert sorted(rule["name"] for rule in rules) == sorted(expected)
    assert [rule for rule in rules if rule["health"] != "ok" or rule.get("lastError")] == []


@pytest.mark.parametrize("style", ["compose", "operator"])
def test_every_selector_of_a_rule_selects_something(site: Site, style: str) -> None:
    """A mistake in a metric, a label or its value would make an alert that never fires."""
    server = site.prometheus[style]
    wanted = {selector for group in groups() for rule in group["rules"] for selector in promql.selectors(rule["expr"])}

    def selected(selector: str) -> bool:
        return bool(server.ask("query", query=f"last_over_time({selector}[10m])")["result"])

    assert until_none_is_left(site, sorted(wanted), selected) == []


@pytest.mark.parametrize("style", ["compose", "operator"])
def test_nothing_is_wrong_with_a_healthy_stack(site: Site, style: str) -> None:
    """Errors that people make, and a teacher that came back, are no alarm."""
    alerts = site.prometheus[style].ask("query", query='ALERTS{alertstate="firing"}')["result"]
    assert alerts == []


def groups() -> list[dict[str, Any]]:
    read: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"]
    return read
