"""A release of the chart without a cluster: its services as processes with the settings that the chart renders, each
pod a host, its NetworkPolicies enforced by the hosts' firewalls."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import httpx
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from redis import Redis

from foundry.rpc.tokens import holder_of, make_tokens
from tests import seaweed, valkey
from tests.collector import Collector
from tests.deploy.chart import NAME, NAMESPACE, SERVICES, Manifest, job_of, of_kind, one, pods, render
from tests.deploy.network.firewall import rules
from tests.deploy.network.flows import Flow, chart_without
from tests.deploy.network.hosts import Host, Network
from tests.deploy.network.hub import MODEL, Hub
from tests.deploy.network.name_server import NameServer
from tests.deploy.network.policy import NAMESPACE_LABEL, Peer
from tests.kube_api import KubeApi
from tests.process import spawn
from tests.tiny import build_tiny_model

# Who is not of the release. The address of the last is one that nobody has a reason to speak to.
OUTSIDE = {
    "clients": Peer("ingress", address="10.0.1.1"),
    "prometheus": Peer("monitoring", address="10.0.1.2"),
    "dns": Peer("kube-system", address="10.0.1.3"),
    "otlp": Peer("telemetry", address="10.0.1.4"),
    "hub": Peer(None, address="203.0.113.1"),
    "kube-api": Peer(None, address="203.0.113.2"),
    "internet": Peer(None, address="198.51.100.1"),
}
# Where somebody listens, over TCP.
PORTS = {
    "gateway": {8000, 9090},
    "rollout": {7001, 9090},
    "teacher": {7002, 9090},
    "trainer": {7003, 9090},
    "redis": {6379},
    "objects": {8333},
    "dns": {53},
    "otlp": {4317},
    "hub": {80},
    "kube-api": {6443},
    "internet": {53, 80, 443, 4317, 6443},
}
# The second pod of a run that has two.
_SECOND_TRAINER = "trainer-1"
_RENDEZVOUS_PORT = 29500
_API_KEY = "fdy_bootstrapkey_" + "k" * 43
# Everything that a flow depends on is enabled, and whoever can be named is.
VALUES: dict[str, Any] = {
    # There are no Services here: a name is a pod's address.
    "gateway": {"service": {"port": 8000}, "settings": {"jobs": {"max_nodes": 2}}},
    "monitoring": {"otlpEndpoint": "http://otlp:4317"},
    "model": {"hub": {"id": MODEL, "endpoint": "http://hub"}},
    "tests": {"timeoutSeconds": 1},
    "networkPolicy": {
        "clients": [{"namespaceSelector": {"matchLabels": {NAMESPACE_LABEL: "ingress"}}}],
        "dns": [{"namespaceSelector": {"matchLabels": {NAMESPACE_LABEL: "kube-system"}}}],
        "otlp": [{"namespaceSelector": {"matchLabels": {NAMESPACE_LABEL: "telemetry"}}}],
        "hub": [{"ipBlock": {"cidr": "203.0.113.1/32"}}],
        "kubeAPI": {"to": [{"ipBlock": {"cidr": "203.0.113.2/32"}}], "ports": [6443]},
    },
}
# What fails is to fail in seconds.
_STORE = {"STORE__REDIS_TIMEOUT_SECONDS": "1", "STORE__OBJECTS_RETRY_SECONDS": "1"}
_IMPATIENT = {
    "gateway": {
        **_STORE,
        "POLL_SECONDS": "0.2",
        "RETRY_TIMEOUT_SECONDS": "0.5",
        "REQUEST_TIMEOUT_SECONDS": "10",
        "JOBS__POLL_SECONDS": "0.2",
        "JOBS__MAX_BACKOFF_SECONDS": "0.2",
    },
    # What is pulled is pulled when it is asked for.
    "rollout": {**_STORE, "PREFETCH": "false"},
    "teacher": {},
    "trainer": {
        **_STORE,
        "LEASE_SECONDS": "2",
        "ROLLOUT_TIMEOUT_SECONDS": "5",
        "TEACHER_TIMEOUT_SECONDS": "5",
    },
}
_NUM_CARTRIDGES = 12


def component(host: str) -> str:
    """What runs on a host."""
    return "trainer" if host == _SECOND_TRAINER else host


class Release:
    """Use as a context; begins with all flows open."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.key_file = directory / "FOUNDRY_ADMIN_KEY_FILE"
        self._manifests = render(VALUES)
        jobs = [job_of(manifest) for manifest in self._manifests if "job.yaml" in manifest.get("data", {})]
        # By component; of several pods of one, such as tests, all are the same to a policy.
        self.pods = {
            pod["metadata"]["labels"]["app.kubernetes.io/component"]: pod for _, pod in pods(self._manifests + jobs)
        }
        self.peers = OUTSIDE | {
            name: Peer(NAMESPACE, pod["metadata"]["labels"], f"10.0.0.{index}")
            for index, (name, pod) in enumerate(self.pods.items(), start=1)
        }
        self.peers[_SECOND_TRAINER] = replace(self.peers["trainer"], address="10.0.0.100")
        self.hosts: dict[str, Host] = {}
        self.collector = Collector()
        self.kube_api = KubeApi(directory, OUTSIDE["kube-api"].address, 6443)
        self._services: dict[str, subprocess.Popen[bytes]] = {}
        self._cartridges = {kind: count() for kind in ("hot", "durable")}
        self._files = count()
        self._undo = ExitStack()

    def __enter__(self) -> Release:
        with self._undo as undo:
            network = Network(OUTSIDE["dns"].address)
            self._undo.callback(network.close)
            self.hosts = {name: network.add(name, peer.address) for name, peer in self.peers.items()}
            build_tiny_model(self._directory / "model")
            self._start_outside()
            self._start_stores()
            self._enforce(self._manifests)
            for name in SERVICES:
                self._undo.callback(self.stop, name)
                self._start(name)
            self._publish()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    @contextmanager
    def without(self, flow: Flow) -> Iterator[None]:
        """Within it the policies are those of the chart whose list lacks `flow`."""
        with self._enforced(render(VALUES, chart=chart_without(flow, self._directory))):
            yield

    @contextmanager
    def without_policies(self) -> Iterator[None]:
        with self._enforced([]):
            yield

    @contextmanager
    def _enforced(self, manifests: list[Manifest]) -> Iterator[None]:
        self._enforce(manifests)
        try:
            yield
        finally:
            self._enforce(self._manifests)

    def _enforce(self, manifests: list[Manifest]) -> None:
        policies = of_kind(manifests, "NetworkPolicy")
        ports = {(port, "TCP") for listening in PORTS.values() for port in listening} | {(53, "UDP")}
        for name in (*self.pods, _SECOND_TRAINER):
            others = [peer for other, peer in self.peers.items() if other != name]
            self.hosts[name].set_firewall(rules(policies, self.peers[name], others, ports))

    def restart(self, name: str) -> None:
        """As a new pod: nothing is known from before. Returns when it listens or has ended."""
        self.stop(name)
        self._start(name)
        own = (self.peers[name].address, min(PORTS[name]))
        while not (self._services[name].poll() is not None or self.connects(name, own)):
            time.sleep(0.05)

    def stop(self, name: str) -> None:
        if (service := self._services.pop(name, None)) is not None:
            service.kill()
            service.wait()

    @contextmanager
    def trained_by_two(self, run_id: str) -> Iterator[None]:
        """Within it two pods train the run, one rank each, as the Job of a run with two nodes has them."""
        rendezvous = {"PET_MASTER_ADDR": self.peers["trainer"].address, "PET_MASTER_PORT": str(_RENDEZVOUS_PORT)}
        started = []
        try:
            for rank, name in enumerate(("trainer", _SECOND_TRAINER)):
                # By the name of the machine, which all hosts here share, gloo would find another address.
                ranks = {"PET_NNODES": "2", "PET_NODE_RANK": str(rank), "GLOO_SOCKET_IFNAME": "eth0"}
                command = self.hosts[name].command(sys.executable, "-m", "services.trainer.launch", "--run", run_id)
                environment = os.environ | self._environment("trainer") | rendezvous | ranks
                with self._log(name).open("ab") as log:
                    started.append(spawn(command, env=environment, stdout=log, stderr=log))
            yield
        finally:
            for name in ("trainer", _SECOND_TRAINER):
                self.hosts[name].kill()
            for launcher in started:
                launcher.wait()

    def restart_ended(self) -> None:
        """As the kubelet does."""
        for name in SERVICES:
            if name not in self._services or self._services[name].poll() is not None:
                self.restart(name)

    def knows_names(self, source: str) -> bool:
        """Whether a host can look a name up."""
        return self.run(source, ["getent", "ahostsv4", "otlp"], {}).returncode == 0

    def connects(self, source: str, target: tuple[str, int]) -> bool:
        """Whether a host can open a TCP connection to this address and port."""

        def attempt() -> bool:
            try:
                socket.create_connection(target, timeout=5).close()
            except OSError:
                return False
            return True

        return self.hosts[source].call(attempt)

    def ask(
        self, source: str, method: str, target: str, path: str, body: Any = None, port: int = 8000
    ) -> httpx.Response:
        """HTTP from one host to another, on a connection of its own. Raises httpx.TransportError."""
        url = f"http://{self.peers[target].address}:{port}{path}"
        key = {"authorization": f"Bearer {_API_KEY}"}
        return self.hosts[source].call(
            lambda: httpx.request(method, url, json=body, headers=key, timeout=10, trust_env=False, verify=False)
        )

    def run(self, name: str, arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """A process on a host, until its end, with its output."""
        command = self.hosts[name].command(*arguments)
        environment = os.environ | environment
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    def fresh_directory(self) -> Path:
        return self._directory / f"fresh-{next(self._files)}"

    def fresh_cartridge(self, kind: str) -> str:
        """Name of one that no rollout server has: `hot` is in Redis alone, of `durable` Redis has only the name."""
        return f"{kind}-{next(self._cartridges[kind])}"

    def log(self, name: str) -> str:
        """The end of a service's log."""
        return self._log(name).read_text()[-2000:]

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"

    def _start_outside(self) -> None:
        names = {f"{NAME}-{name}": self.peers[name].address for name in self.pods}
        names |= {name: peer.address for name, peer in OUTSIDE.items()}
        self._open("dns", lambda: NameServer(OUTSIDE["dns"].address, names))
        self._open("hub", lambda: Hub(OUTSIDE["hub"].address, 80))
        address = OUTSIDE["internet"].address
        for port in PORTS["internet"]:
            self._open("internet", partial(socket.create_server, (address, port)))
        exports = grpc.server(ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self.collector, exports)
        self.hosts["otlp"].call(lambda: (exports.add_insecure_port("0.0.0.0:4317"), exports.start()))
        self._undo.callback(lambda: exports.stop(grace=None).wait())
        template = one(self._manifests, "ConfigMap", "trainer-job")
        self.kube_api.put_config_map(template["metadata"]["name"], template["data"])
        self.hosts["kube-api"].call(self.kube_api.start)
        self._undo.callback(self.kube_api.stop)

    def _open(self, name: str, opening: Callable[[], Any]) -> None:
        self._undo.callback(self.hosts[name].call(opening).close)

    def _start_stores(self) -> None:
        for name, port in (("redis", 6379), ("objects", 8333)):
            (self._directory / name).mkdir()
            assert PORTS[name] == {port}
        redis = self.hosts["redis"].call(lambda: valkey.Valkey(self._directory / "redis", bind="0.0.0.0", port=6379))
        self._undo.callback(redis.close)
        self.hosts["redis"].call(lambda: asyncio.run(redis.start()))
        objects = seaweed.Seaweed(self._directory / "objects", bind="0.0.0.0", port=8333)
        self._undo.callback(objects.close)
        self.hosts["objects"].call(objects.start)

    def _publish(self) -> None:
        command = [sys.executable, "-m", "tests.deploy.network.publish", str(_NUM_CARTRIDGES)]
        published = self.run("trainer", command, self._environment("trainer"))
        assert published.returncode == 0, published.stderr

        def forget_bytes() -> None:
            with Redis(port=6379, username=valkey.TESTER, password=valkey.PASSWORD) as redis:
                for name, digest in json.loads(published.stdout).items():
                    if name.startswith("durable"):
                        assert redis.delete(*redis.scan_iter(f"foundry:bytes:{digest}*", count=1000)) > 1

        self.hosts["redis"].call(forget_bytes)

    def _start(self, name: str) -> None:
        command = self.hosts[name].command(sys.executable, "-m", f"services.{name}.main")
        with self._log(name).open("ab") as log:
            self._services[name] = spawn(command, env=os.environ | self._environment(name), stdout=log, stderr=log)

    def _environment(self, name: str) -> dict[str, str]:
        """As the chart has it, but for files, which are elsewhere here, and for what makes failures slow."""
        (container,) = self.pods[name]["spec"]["containers"]
        rendered = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
        secrets = {
            "FOUNDRY_ADMIN_KEY_FILE": _API_KEY,
            "FOUNDRY_STORE__REDIS_PASSWORD_FILE": valkey.PASSWORD,
            "FOUNDRY_STORE__OBJECTS_ACCESS_KEY_ID_FILE": seaweed.KEY,
            "FOUNDRY_STORE__OBJECTS_SECRET_ACCESS_KEY_FILE": seaweed.SECRET,
            "FOUNDRY_STORE__SIGNING_KEY_FILE": "k" * 32,
        }
        for variable, secret in secrets.items():
            if variable in rendered:
                path = self._directory / variable
                path.write_text(secret)
                rendered[variable] = str(path)
        if "FOUNDRY_RPC_TOKENS_DIRECTORY" in rendered:
            make_tokens(self._directory / "tokens")
            rendered["FOUNDRY_RPC_TOKENS_DIRECTORY"] = str(self._directory / "tokens" / holder_of(name))
        if "FOUNDRY_MODEL" in rendered:
            rendered["FOUNDRY_MODEL"] = str(self._directory / "model")
        impatient = {f"FOUNDRY_{key}": value for key, value in _IMPATIENT[name].items()}
        others = {"KUBECONFIG": str(self.kube_api.kubeconfig), "OMP_NUM_THREADS": "1", "OTEL_BSP_SCHEDULE_DELAY": "100"}
        return rendered | impatient | others
