"""Each flow in the chart's list is needed by something that the release does, and nothing else is open.

The release runs without a cluster: see release.py. With FOUNDRY_REQUIRE_NETWORK=1 a machine that can't make the hosts
is an error, without it the tests are skipped there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import product

import pytest

from tests.deploy.chart import SERVICES
from tests.deploy.network.checks import Unmet, need_of
from tests.deploy.network.flows import FLOWS, Flow, name
from tests.deploy.network.hosts import unavailable
from tests.deploy.network.release import OUTSIDE, PORTS, Release, component

# For what must hold.
_SECONDS = 60.0


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    if reason := unavailable():
        if os.environ.get("FOUNDRY_REQUIRE_NETWORK") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with Release(tmp_path_factory.mktemp("release")) as running:
        yield running


@pytest.mark.parametrize("flow", FLOWS, ids=name)
def test_flow_is_needed(flow: Flow, release: Release) -> None:
    """The flow's check holds; without the flow it does not, though it has twice the time."""
    need = need_of(flow)
    release.restart_ended()
    need.prepare(release)
    began = time.monotonic()
    try:
        need.check(release, _SECONDS)
    except Unmet:
        print(*(f"{service}:\n{release.log(service)}" for service in SERVICES))
        raise
    took_seconds = time.monotonic() - began
    with release.without(flow):
        need.prepare(release)
        with pytest.raises(Unmet):
            need.check(release, 2 * took_seconds + 1)


def test_what_is_open_is_what_is_listed(release: Release) -> None:
    """Tried from every host to every port at which somebody listens."""
    release.restart_ended()
    tried = product(release.hosts, ((target, port) for target, ports in PORTS.items() for port in sorted(ports)))
    open_ports = {
        (component(source), target, port)
        for source, (target, port) in tried
        if source != target
        and not {source, target} <= OUTSIDE.keys()
        and release.connects(source, (release.peers[target].address, port))
    }
    listed = {
        (flow["from"], flow["to"], port)
        for flow in FLOWS
        for port in ([flow["port"]] if "port" in flow else PORTS[flow["to"]])
    }
    assert open_ports == listed
    assert {pod for pod in release.pods if release.knows_names(pod)} == {who for who, to, _ in listed if to == "dns"}


def test_what_is_refused_would_be_answered(release: Release) -> None:
    """Somebody listens wherever the test above tries: without policies all are connected."""
    release.restart_ended()
    with release.without_policies():
        for target, ports in PORTS.items():
            for source, port in product({"clients", "rollout"} - {target}, ports):
                where = (release.peers[target].address, port)
                assert release.connects(source, where), (source, target, port)
