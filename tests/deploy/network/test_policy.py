"""Small policies, each with what the API's reference says of it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.deploy.network.policy import Peer, allowed, isolated

WEB = Peer("shop", {"app": "web", "tier": "front"}, "10.0.0.1", {"http": 8080})
STORE = Peer("shop", {"app": "store"}, "10.0.0.2", {"http": 9000})
MONITOR = Peer("watch", {"app": "monitor"}, "10.0.0.3")
INSIDE_EXCEPTION = Peer(None, address="203.0.113.130")
OUTSIDE = Peer(None, address="203.0.113.1")


def policy(selector: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p", "namespace": "shop"}, "spec": {"podSelector": selector, **spec}}


def of(**labels: str) -> dict[str, Any]:
    return {"matchLabels": labels}


def test_without_a_policy_all_is_open() -> None:
    assert allowed([], OUTSIDE, WEB, 22)
    assert allowed([], WEB, MONITOR, 53, "UDP")


def test_who_is_selected_is_cut_off_in_that_direction_only() -> None:
    closed = [policy(of(app="web"), policyTypes=["Ingress"])]
    assert not allowed(closed, STORE, WEB, 80)
    assert allowed(closed, WEB, STORE, 80)
    assert allowed(closed, MONITOR, STORE, 80)
    assert isolated(closed, WEB, "Ingress")
    assert not isolated(closed, WEB, "Egress")


def test_an_empty_selector_is_every_pod_of_the_namespace_and_no_other() -> None:
    closed = [policy({}, policyTypes=["Egress"])]
    assert not allowed(closed, WEB, OUTSIDE, 80)
    assert not allowed(closed, STORE, OUTSIDE, 80)
    assert allowed(closed, MONITOR, OUTSIDE, 80)


def test_types_that_are_left_out_follow_from_the_rules() -> None:
    ingress_only = [policy(of(app="web"))]
    assert not allowed(ingress_only, STORE, WEB, 80)
    assert allowed(ingress_only, WEB, STORE, 80)
    both = [policy(of(app="web"), egress=[{"to": [{"podSelector": of(app="store")}]}])]
    assert not allowed(both, STORE, WEB, 80)
    assert allowed(both, WEB, STORE, 80)
    assert not allowed(both, WEB, OUTSIDE, 80)


def test_an_empty_rule_lets_all_through() -> None:
    assert allowed([policy({}, ingress=[{}])], OUTSIDE, WEB, 22)


def test_both_ends_must_agree() -> None:
    sends = policy(of(app="web"), policyTypes=["Egress"], egress=[{"to": [{"podSelector": of(app="store")}]}])
    closed = policy(of(app="store"), policyTypes=["Ingress"])
    takes = policy(of(app="store"), ingress=[{"from": [{"podSelector": of(app="web")}]}])
    assert not allowed([sends, closed], WEB, STORE, 80)
    # Policies add up: one that denies takes nothing from one that lets through.
    assert allowed([sends, closed, takes], WEB, STORE, 80)


@pytest.mark.parametrize(
    ("entry", "open_to"),
    [
        ({"podSelector": {}}, {"store"}),
        ({"podSelector": of(app="monitor")}, set()),
        ({"namespaceSelector": {}}, {"store", "monitor"}),
        ({"namespaceSelector": of(**{"kubernetes.io/metadata.name": "watch"})}, {"monitor"}),
        # In one entry both must hold.
        ({"namespaceSelector": {}, "podSelector": of(app="monitor")}, {"monitor"}),
        ({"ipBlock": {"cidr": "203.0.113.0/24"}}, {"outside", "exception"}),
        ({"ipBlock": {"cidr": "203.0.113.0/24", "except": ["203.0.113.128/25"]}}, {"outside"}),
        ({"ipBlock": {"cidr": "0.0.0.0/0"}}, {"outside", "exception"}),
    ],
)
def test_peers(entry: dict[str, Any], open_to: set[str]) -> None:
    policies = [policy(of(app="web"), ingress=[{"from": [entry]}])]
    who = {"store": STORE, "monitor": MONITOR, "outside": OUTSIDE, "exception": INSIDE_EXCEPTION}
    assert {name for name, peer in who.items() if allowed(policies, peer, WEB, 80)} == open_to


@pytest.mark.parametrize(
    ("entry", "open_ports"),
    [
        ({"port": 80}, {(80, "TCP")}),
        ({"port": 53, "protocol": "UDP"}, {(53, "UDP")}),
        ({"protocol": "TCP"}, {(53, "TCP"), (80, "TCP"), (8080, "TCP"), (9000, "TCP")}),
        ({"port": 80, "endPort": 8080}, {(80, "TCP"), (8080, "TCP")}),
        # A name is looked up in the pod that is connected to.
        ({"port": "http"}, {(9000, "TCP")}),
    ],
)
def test_ports(entry: dict[str, Any], open_ports: set[tuple[int, str]]) -> None:
    policies = [policy(of(app="web"), policyTypes=["Egress"], egress=[{"ports": [entry]}])]
    candidates = [(53, "TCP"), (53, "UDP"), (80, "TCP"), (8080, "TCP"), (9000, "TCP")]
    assert {found for found in candidates if allowed(policies, WEB, STORE, *found)} == open_ports


@pytest.mark.parametrize(
    ("operator", "values", "selected"),
    [
        ("In", ["front", "back"], {"web"}),
        ("NotIn", ["front"], {"store"}),
        ("Exists", [], {"web"}),
        ("DoesNotExist", [], {"store"}),
    ],
)
def test_expressions(operator: str, values: list[str], selected: set[str]) -> None:
    selector = {"matchExpressions": [{"key": "tier", "operator": operator, "values": values}]}
    policies = [policy(selector)]
    assert {peer.labels["app"] for peer in (WEB, STORE) if isolated(policies, peer, "Ingress")} == selected
