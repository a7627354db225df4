"""Pods of a release are cut off, but for the flows in files/flows.yaml, each of which is needed."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.chart import (
    NAMESPACE,
    RELEASE,
    VALUES,
    Manifest,
    job_of,
    of_kind,
    one,
    pods,
    render,
    rendered,
    values_of,
)
from tests.deploy.network.flows import FLOWS, Flow, chart_without, name
from tests.deploy.network.policy import NAMESPACE_LABEL, Peer, allowed

# Between pods of one component there is a test of its own below.
ACROSS = [flow for flow in FLOWS if flow["from"] != flow["to"]]
# Everything that a flow may depend on, and every peer outside another one.
ALL: dict[str, Any] = {
    "monitoring": {"otlpEndpoint": "http://collector:4317"},
    "model": {"hub": {"id": "a/b"}},
    "networkPolicy": {
        "clients": [{"namespaceSelector": {"matchLabels": {NAMESPACE_LABEL: "ingress"}}}],
        "dns": [{"namespaceSelector": {"matchLabels": {NAMESPACE_LABEL: "kube-system"}}}],
        "otlp": [{"ipBlock": {"cidr": "203.0.113.1/32"}}],
        "hub": [{"ipBlock": {"cidr": "203.0.113.2/32"}}],
        "kubeAPI": {"to": [{"ipBlock": {"cidr": "203.0.113.3/32"}}], "ports": [6443]},
    },
}
PORTS = {"redis": 6379, "objects": 8333, "hub": 443, "otlp": 4317, "kube-api": 6443, "dns": 53}
OUTSIDE = {
    "clients": Peer("ingress"),
    "prometheus": Peer("monitoring"),
    "dns": Peer("kube-system"),
    "otlp": Peer(None, address="203.0.113.1"),
    "hub": Peer(None, address="203.0.113.2"),
    "kube-api": Peer(None, address="203.0.113.3"),
}


def peers(manifests: list[Manifest]) -> dict[str, Peer]:
    jobs = [job_of(manifest) for manifest in manifests if "job.yaml" in manifest.get("data", {})]
    ours = {
        pod["metadata"]["labels"]["app.kubernetes.io/component"]: Peer(NAMESPACE, pod["metadata"]["labels"])
        for _, pod in pods(manifests + jobs)
    }
    return OUTSIDE | ours


def open_flows(manifests: list[Manifest]) -> set[tuple[str, str, int]]:
    policies = of_kind(manifests, "NetworkPolicy")
    who = peers(manifests)
    ports = {*PORTS.values(), 7001, 7002, 7003, 8000, 9090, 22}
    return {
        (source, target, port)
        for source, target, port in product(who, who, ports)
        if source != target
        and not {source, target} <= OUTSIDE.keys()
        and allowed(policies, who[source], who[target], port)
    }


def key(flow: Flow) -> tuple[str, str, int]:
    return flow["from"], flow["to"], flow.get("port") or PORTS[flow["to"]]


@pytest.fixture(scope="module")
def everything() -> set[tuple[str, str, int]]:
    return open_flows(render(ALL))


def test_what_is_open_is_what_is_listed(everything: set[tuple[str, str, int]]) -> None:
    assert everything == {key(flow) for flow in ACROSS}


@pytest.mark.parametrize("flow", ACROSS, ids=name)
def test_each_flow_is_needed(flow: Flow, everything: set[tuple[str, str, int]], tmp_path: Path) -> None:
    """Without its line it is closed, and nothing else is."""
    left = open_flows(render(ALL, chart=chart_without(flow, tmp_path)))
    assert everything - left == {key(flow)}


def test_the_pods_of_a_run_speak_to_each_other_where_it_may_have_several() -> None:
    """At any port, and they find each other by a name; where a run has one pod they have neither."""

    def between(values: dict[str, Any], port: int) -> bool:
        manifests = render(values)
        trainer = peers(manifests)["trainer"]
        return allowed(of_kind(manifests, "NetworkPolicy"), trainer, trainer, port)

    several = values_of("jobs-nodes")
    assert between(several, 29500)
    assert between(several, 40123)
    assert not between({}, 29500)
    manifests = rendered("jobs-nodes")
    (job,) = of_kind(manifests, "Job")
    service = one(manifests, "Service", "ranks")
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert "subdomain" not in one(rendered("default"), "Job")["spec"]["template"]["spec"]


def test_flows_are_open_only_where_they_are_needed() -> None:
    default = open_flows(rendered("default"))
    assert not {flow for flow in default if flow[1] in ("otlp", "hub") and flow[0] != "gateway"}
    assert ("gateway", "kube-api", 6443) in default
    workers = open_flows(rendered("workers"))
    assert not {flow for flow in workers if flow[1] == "kube-api"}


@pytest.mark.parametrize("name", sorted(set(VALUES) - {"policies-off"}))
def test_every_pod_is_cut_off_in_both_directions(name: str) -> None:
    manifests = rendered(name)
    policies = of_kind(manifests, "NetworkPolicy")
    stranger = Peer("elsewhere")
    # One that no policy names, such as a person's debugging pod with the release's labels.
    release = {"app.kubernetes.io/name": "cartridge-foundry", "app.kubernetes.io/instance": RELEASE}
    for component, peer in {**peers(manifests), "unnamed": Peer(NAMESPACE, release)}.items():
        if component in OUTSIDE:
            continue
        for port in (22, 7001, 7002, 7003, 6379, 8333, 9090):
            assert not allowed(policies, stranger, peer, port), (component, port)
            assert not allowed(policies, peer, stranger, port), (component, port)


def test_external_stores_are_reached_at_their_ports() -> None:
    def open_ports(name: str, component: str) -> set[int]:
        manifests = rendered(name)
        policies = of_kind(manifests, "NetworkPolicy")
        pod = peers(manifests)[component]
        outside = Peer(None, address="10.20.0.1")
        return {port for port in (80, 443, 6379, 6380, 8333, 9443) if allowed(policies, pod, outside, port)}

    assert open_ports("external-redis-tls", "rollout") == {6380}
    assert open_ports("external-s3", "rollout") == {9443}
    assert open_ports("external-gs", "trainer") == {443}
    assert open_ports("objects-claim", "trainer") == set()


def test_policies_can_be_left_to_the_cluster() -> None:
    assert of_kind(rendered("policies-off"), "NetworkPolicy") == []
