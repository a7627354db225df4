"""NetworkPolicies, judged as the API's reference says: what is selected is cut off but for what a rule lets through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

from tests.deploy.chart import Manifest

NAMESPACE_LABEL = "kubernetes.io/metadata.name"


@dataclass(frozen=True)
class Peer:
    """A pod, or with no namespace an address outside the cluster."""

    namespace: str | None
    labels: dict[str, str] = field(default_factory=dict)
    address: str = "198.51.100.1"


def allowed(policies: Sequence[Manifest], source: Peer, target: Peer, port: int) -> bool:
    sends = _side_allows(policies, source, target, port, "Egress", "to")
    return sends and _side_allows(policies, target, source, port, "Ingress", "from")


def _side_allows(policies: Sequence[Manifest], pod: Peer, other: Peer, port: int, direction: str, side: str) -> bool:
    selecting = [policy for policy in policies if _selected(policy, pod, direction)]
    if not selecting:
        return True
    rules = [rule for policy in selecting for rule in policy["spec"].get(direction.lower()) or []]
    # Nothing is judged that is not understood.
    assert all(entry.keys() == {"port", "protocol"} for rule in rules for entry in rule["ports"])
    return any(
        any(entry["port"] == port for entry in rule["ports"])
        and (not rule.get(side) or any(_is(other, peer, pod) for peer in rule[side]))
        for rule in rules
    )


def _selected(policy: Manifest, pod: Peer, direction: str) -> bool:
    return (
        pod.namespace == policy["metadata"]["namespace"]
        and direction in policy["spec"]["policyTypes"]
        and _matches(policy["spec"]["podSelector"], pod.labels)
    )


def _is(other: Peer, peer: dict[str, Any], pod: Peer) -> bool:
    if "ipBlock" in peer:
        return other.namespace is None and ip_address(other.address) in ip_network(peer["ipBlock"]["cidr"])
    if other.namespace is None:
        return False
    if "namespaceSelector" not in peer:
        return other.namespace == pod.namespace and _matches(peer["podSelector"], other.labels)
    in_namespace = _matches(peer["namespaceSelector"], {NAMESPACE_LABEL: other.namespace})
    return in_namespace and _matches(peer.get("podSelector", {}), other.labels)


def _matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return bool(selector.get("matchLabels", {}).items() <= labels.items())
