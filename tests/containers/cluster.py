"""A release of the chart in a namespace of its own, in whatever cluster KUBECONFIG names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import helm_python
import httpx
from kubernetes import client as kube
from kubernetes import config as kube_config
from kubernetes.client.exceptions import ApiException

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "cartridge-foundry"
RELEASE = "foundry"
HELM_SECONDS = 600
_EVICTION_SECONDS = 300.0


class Cluster:
    """Talks to the API server alone: the gateway is reached through its proxy, so that any cluster will do."""

    def __init__(self, namespace: str, values: dict[str, Any]) -> None:
        self.namespace = namespace
        self.values = values
        kube_config.load_kube_config()
        self.core = kube.CoreV1Api()
        self.apps = kube.AppsV1Api()
        self.batch = kube.BatchV1Api()
        self._helm = helm_python.Config(kubeconfig_path=os.environ.get("KUBECONFIG"), namespace=namespace)
        self._proxy = subprocess.Popen(["kubectl", "proxy", "--port=0"], stdout=subprocess.PIPE, text=True)
        assert self._proxy.stdout is not None
        self._address = re.findall(r"127\.0\.0\.1:\d+", self._proxy.stdout.readline())[0]
        self.url = f"http://{self._address}/api/v1/namespaces/{namespace}/services/{RELEASE}-cartridge-foundry-gateway:8000/proxy"

    def close(self) -> None:
        self._proxy.terminate()
        self._proxy.communicate()
        self._helm.close()

    # Helm

    def install(self) -> None:
        self._helm.install(
            CHART, RELEASE, self.values, namespace=self.namespace, timeout=HELM_SECONDS, wait="watcher",
            create_namespace=True,
        )  # fmt: skip

    def upgrade(self, values: dict[str, Any]) -> None:
        self._helm.upgrade(
            CHART, RELEASE, merged(self.values, values), namespace=self.namespace, timeout=HELM_SECONDS, wait="watcher"
        )

    def rollback(self, revision: int) -> None:
        self._helm.rollback(RELEASE, version=revision, timeout=HELM_SECONDS, wait="watcher")

    def test(self) -> None:
        self._helm.test(RELEASE, timeout=HELM_SECONDS, logs=True)

    def uninstall(self) -> None:
        self._helm.uninstall(RELEASE, timeout=HELM_SECONDS, wait="watcher", ignore_not_found=True)

    def revision(self) -> int:
        return max(int(release["revision"]) for release in self._helm.history(RELEASE))

    # What there is

    def pods(self, component: str = "") -> list[kube.V1Pod]:
        """Those that are not on their way out."""
        selector = f"app.kubernetes.io/instance={RELEASE}"
        if component:
            selector += f",app.kubernetes.io/component={component}"
        listed = self.core.list_namespaced_pod(self.namespace, label_selector=selector).items
        return [pod for pod in listed if pod.metadata.deletion_timestamp is None and pod.status.phase != "Succeeded"]

    def jobs(self) -> list[kube.V1Job]:
        """Those of runs."""
        found: list[kube.V1Job] = self.batch.list_namespaced_job(self.namespace, label_selector="foundry.dev/run").items
        return found

    def wait_ready(self, component: str, count: int) -> None:
        def ready() -> bool:
            pods = self.pods(component)
            return len(pods) == count and all(_ready(pod) for pod in pods)

        wait_until(ready, f"{count} ready pods of {component}")

    def objects(self, kinds: Iterable[str]) -> list[str]:
        """Everything of these kinds in the namespace, as kind/name."""
        listed = json.loads(self.kubectl("get", ",".join(kinds), "-o", "json"))["items"]
        return sorted(f"{item['kind']}/{item['metadata']['name']}" for item in listed)

    def logs(self) -> str:
        """The end of every container's log, for whoever reads why a test failed."""
        texts = [self.kubectl("get", "pods,jobs,events", "-o", "wide", check=False)]
        for pod in self.core.list_namespaced_pod(self.namespace).items:
            name = pod.metadata.name
            texts.append(f"== {name}\n" + self.kubectl("logs", name, "--all-containers", "--tail=25", check=False))
        return "\n".join(texts)

    def kubectl(self, *arguments: str, check: bool = True) -> str:
        command = ["kubectl", "--namespace", self.namespace, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    # What is done to it

    def kill(self, pod: kube.V1Pod) -> None:
        """As if its node had lost power: no grace."""
        self.core.delete_namespaced_pod(pod.metadata.name, self.namespace, grace_period_seconds=0)

    def evict(self, pod: kube.V1Pod) -> None:
        """As `kubectl drain` does: asks again while a disruption budget forbids it."""
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod.metadata.name}/eviction"
        served = httpx.get(f"http://{self._address}/apis/policy", trust_env=False).json()["versions"]
        version = "policy/v1" if any(each["version"] == "v1" for each in served) else "policy/v1beta1"
        body = {"apiVersion": version, "kind": "Eviction", "metadata": {"name": pod.metadata.name}}

        def evicted() -> bool:
            response = httpx.post(f"http://{self._address}{path}", json=body, trust_env=False)
            assert response.status_code in (200, 201, 404, 429), response.text
            return response.status_code != 429

        wait_until(evicted, f"the eviction of {pod.metadata.name}", timeout_seconds=_EVICTION_SECONDS)

    def api_as(self, account: str) -> kube.ApiClient:
        """A client with the token of a service account, as its pods have it."""
        token = self.core.create_namespaced_service_account_token(
            account, self.namespace, kube.AuthenticationV1TokenRequest(spec=kube.V1TokenRequestSpec(audiences=[]))
        ).status.token
        admin = kube.Configuration.get_default_copy()
        settings = kube.Configuration(host=admin.host)
        settings.ssl_ca_cert = admin.ssl_ca_cert
        settings.verify_ssl = admin.verify_ssl
        settings.api_key = {"authorization": f"Bearer {token}"}
        return kube.ApiClient(settings)


def _ready(pod: kube.V1Pod) -> bool:
    return any(each.type == "Ready" and each.status == "True" for each in pod.status.conditions or [])


def refused(call: Callable[[], object]) -> bool:
    """Whether the API server forbids the call."""
    try:
        call()
    except ApiException as error:
        if error.status != 403:
            raise
        return True
    return False


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes` laid over, as Helm lays one file of values over another."""
    result = dict(values)
    for key, change in changes.items():
        known = result.get(key)
        result[key] = merged(known, change) if isinstance(known, dict) and isinstance(change, dict) else change
    return result


def wait_until(condition: Callable[[], bool], what: str, *, timeout_seconds: float = 300.0) -> None:
    """Poll what the cluster only shows to those who look."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_seconds:.0f} s"
        time.sleep(0.5)
