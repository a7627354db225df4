"""NetworkPolicies, judged as the API's reference (networking.k8s.io/v1) says.

What no policy selects is open. What one selects is cut off in the policy's directions, but for what a rule of any
policy that selects it lets through. A connection needs both ends to let it through; its replies need nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any, Literal

from tests.deploy.chart import Manifest

NAMESPACE_LABEL = "kubernetes.io/metadata.name"
Direction = Literal["Ingress", "Egress"]

_OPERATORS: dict[str, Callable[[str | None, Sequence[str]], bool]] = {
    "In": lambda value, values: value in values,
    "NotIn": lambda value, values: value not in values,
    "Exists": lambda value, _: value is not None,
    "DoesNotExist": lambda value, _: value is None,
}


@dataclass(frozen=True)
class Peer:
    """A pod, or with no namespace an address outside the cluster."""

    namespace: str | None
    labels: Mapping[str, str] = field(default_factory=dict)
    address: str = "198.51.100.1"
    # Of its containers, by name.
    ports: Mapping[str, int] = field(default_factory=dict)


def allowed(policies: Sequence[Manifest], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether `source` may open a connection to `port` of `target`."""
    return admits(policies, "Egress", source, target, port, protocol) and admits(
        policies, "Ingress", target, source, port, protocol
    )


def isolated(policies: Sequence[Manifest], pod: Peer, direction: Direction) -> bool:
    return any(_selects(policy, pod, direction) for policy in policies)


def admits(
    policies: Sequence[Manifest], direction: Direction, pod: Peer, other: Peer, port: int, protocol: str = "TCP"
) -> bool:
    """Whether the policies of `pod` let it send to (Egress) or be reached by (Ingress) `other`."""
    selecting = [policy for policy in policies if _selects(policy, pod, direction)]
    target, side = (other, "to") if direction == "Egress" else (pod, "from")
    rules = [rule for policy in selecting for rule in policy["spec"].get(direction.lower()) or []]
    return not selecting or any(
        _any(rule.get("ports"), lambda entry: _is_port(entry, target, port, protocol))
        and _any(rule.get(side), lambda entry: _is_peer(entry, other, pod))
        for rule in rules
    )


def _any(entries: Sequence[Manifest] | None, holds: Callable[[Manifest], bool]) -> bool:
    """None named is all of them."""
    return not entries or any(holds(entry) for entry in entries)


def _selects(policy: Manifest, pod: Peer, direction: Direction) -> bool:
    spec = policy["spec"]
    types = spec.get("policyTypes") or (["Ingress", "Egress"] if "egress" in spec else ["Ingress"])
    same_namespace = pod.namespace == policy["metadata"]["namespace"]
    return same_namespace and direction in types and _matches(spec["podSelector"], pod.labels)


def _is_port(entry: Manifest, target: Peer, port: int, protocol: str) -> bool:
    if entry.get("protocol", "TCP") != protocol:
        return False
    first: Any = entry.get("port")
    if isinstance(first, str):
        return target.ports.get(first) == port
    return first is None or int(first) <= port <= int(entry.get("endPort", first))


def _is_peer(entry: Manifest, other: Peer, pod: Peer) -> bool:
    # Blocks are meant for addresses outside: what they say of pods differs between networks.
    if (block := entry.get("ipBlock")) is not None:
        blocks = [block["cidr"], *block.get("except", [])]
        inside, *excepted = [ip_address(other.address) in ip_network(cidr) for cidr in blocks]
        return other.namespace is None and inside and not any(excepted)
    if other.namespace is None:
        return False
    if "namespaceSelector" in entry:
        in_namespace = _matches(entry["namespaceSelector"], {NAMESPACE_LABEL: other.namespace})
    else:
        in_namespace = other.namespace == pod.namespace
    return in_namespace and _matches(entry.get("podSelector", {}), other.labels)


def _matches(selector: dict[str, Any], labels: Mapping[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        _OPERATORS[wanted["operator"]](labels.get(wanted["key"]), wanted.get("values", []))
        for wanted in selector.get("matchExpressions", [])
    )
