"""Rules for one host that enforce NetworkPolicies, as a cluster's network would.

No connection is tracked: each packet is judged by the ports at its two ends, so that new rules also end what is open.
What is refused is refused with a reset rather than dropped, so that it is known at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

from tests.deploy.chart import Manifest
from tests.deploy.network.policy import Direction, Peer, admits, isolated

Port = tuple[int, str]

# Where nobody is known to listen: who may be reached there may be reached at any port that a program is given.
_UNKNOWN_PORT, _GIVEN_PORTS = 61000, "1024:65535"

_CHAINS: dict[Direction, tuple[str, str, str]] = {
    # The chain of what opens a connection, the other address in it, and the chain of what answers.
    "Egress": ("OUTPUT", "-d", "INPUT"),
    "Ingress": ("INPUT", "-s", "OUTPUT"),
}


def rules(policies: Sequence[Manifest], pod: Peer, others: Sequence[Peer], ports: Iterable[Port]) -> str:
    """For iptables-restore. Between `pod` and each of `others`, what the policies admit at `ports`; the rest is refused
    in the directions in which `pod` is isolated."""
    lines = ["*filter"]
    for chain in ("INPUT", "OUTPUT"):
        lines.append(f"-A {chain} {'-i' if chain == 'INPUT' else '-o'} lo -j ACCEPT")
    # What refuses must get out; a reset carries nothing.
    lines.append("-A OUTPUT -p tcp --tcp-flags RST RST -j ACCEPT")
    lines += [
        line
        for direction, other, (port, protocol) in product(_CHAINS, others, sorted(ports))
        if admits(policies, direction, pod, other, port, protocol)
        for line in _admit(direction, other.address, str(port), protocol.lower())
    ]
    lines += [
        line
        for direction, other in product(_CHAINS, others)
        if admits(policies, direction, pod, other, _UNKNOWN_PORT)
        for line in _admit(direction, other.address, _GIVEN_PORTS, "tcp")
    ]
    for direction, (chain, _, _) in _CHAINS.items():
        if isolated(policies, pod, direction):
            lines += [f"-A {chain} -p tcp -j REJECT --reject-with tcp-reset", f"-A {chain} -j REJECT"]
        else:
            lines.append(f"-A {chain} -j ACCEPT")
    return "\n".join([*lines, "COMMIT", ""])


def _admit(direction: Direction, address: str, port: str, protocol: str) -> tuple[str, str]:
    opening, side, answering = _CHAINS[direction]
    back = "-s" if side == "-d" else "-d"
    answers = " ! --syn" if protocol == "tcp" else ""
    return (
        f"-A {opening} {side} {address} -p {protocol} --dport {port} -j ACCEPT",
        f"-A {answering} {back} {address} -p {protocol} --sport {port}{answers} -j ACCEPT",
    )
