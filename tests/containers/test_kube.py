"""The chart on a real cluster, whichever KUBECONFIG names: `make e2e-kube`. Timings go to benchmarks/results/kube.json
when no test has failed.

One release for all tests, in the order of the file: the last one uninstalls it. The images must be where the cluster
finds them (FOUNDRY_REGISTRY, FOUNDRY_TAG); FOUNDRY_ENGINE chooses the rollout's, and of vLLM
the timings go to kube-vllm.json.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client as kube

from foundry.client import FoundryClient
from foundry.errors import FoundryError
from tests.containers.cluster import Cluster, refused, wait_until
from tests.containers.load import QUESTION, small_run, streaming, wait_for_step

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-instruct"
COMPONENTS = ("gateway", "rollout", "teacher", "redis", "objects")
SMALL = {"requests": {"cpu": "50m", "memory": "64Mi"}}
ENGINE = os.environ.get("FOUNDRY_ENGINE", "torch")
VALUES: dict[str, Any] = {
    "global": {"image": {"registry": os.environ.get("FOUNDRY_REGISTRY", ""), "tag": os.environ.get("FOUNDRY_TAG", "")}},
    "model": {"name": MODEL},
    # The API server's proxy, through which these tests reach the gateway, keeps `Authorization` for itself.
    "gateway": {"replicas": 2, "resources": SMALL, "apiKeys": {"enabled": False}},
    "rollout": {
        "replicas": 1,
        "resources": SMALL,
        "settings": {"engine": ENGINE, "vllm": {"kv_bytes": 1024**3}},
    },
    "teacher": {"replicas": 1, "resources": SMALL},
    "trainer": {"mode": "jobs", "resources": SMALL},
    "redis": {"bundled": {"resources": SMALL, "persistence": {"size": "1Gi"}}},
    "objects": {"bundled": {"resources": SMALL, "persistence": {"size": "2Gi"}}},
}
KINDS = [
    *("deployments", "statefulsets", "replicasets", "pods", "services", "configmaps", "secrets", "serviceaccounts"),
    *("roles", "rolebindings", "jobs", "networkpolicies", "poddisruptionbudgets", "horizontalpodautoscalers"),
    "persistentvolumeclaims",
]
TIMINGS: dict[str, float] = {}


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    opened = Cluster(f"foundry-e2e-{secrets.token_hex(3)}", VALUES)
    try:
        began = time.monotonic()
        opened.install()
        TIMINGS["helm install --wait"] = time.monotonic() - began
        yield opened
    except BaseException:
        print(opened.logs())
        raise
    finally:
        opened.uninstall()
        opened.core.delete_namespace(opened.namespace)
        opened.close()
    if not request.session.testsfailed:
        result = {name: round(seconds, 1) for name, seconds in TIMINGS.items()}
        path = ROOT / "benchmarks" / "results" / ("kube-vllm.json" if ENGINE == "vllm" else "kube.json")
        path.write_text(json.dumps({"machine": f"{os.cpu_count()} cores", "seconds": result}, indent=2) + "\n")


@pytest.fixture(autouse=True)
def _logs(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[None]:
    failed = request.session.testsfailed
    began = time.monotonic()
    yield
    TIMINGS[request.node.name] = time.monotonic() - began
    if request.session.testsfailed > failed:
        print(cluster.logs())


@pytest.fixture
def client(cluster: Cluster) -> Iterator[FoundryClient]:
    with FoundryClient(cluster.url, timeout_seconds=300) as opened:
        yield opened


@pytest.fixture(scope="module")
def trained(cluster: Cluster) -> dict[str, Any]:
    """A run that has ended well, undisturbed."""
    with FoundryClient(cluster.url, timeout_seconds=300) as client:
        began = time.monotonic()
        run = wait(client, client.runs.create(**small_run("handbook"))["id"])
        TIMINGS["a run of 4 steps, from POST to its end"] = time.monotonic() - began
    assert run["state"] == "succeeded", run
    return run


def wait(client: FoundryClient, run_id: str) -> dict[str, Any]:
    """The run at its end; the gateway may be away meanwhile."""

    def over() -> bool:
        try:
            return client.runs.get(run_id)["state"] in ("succeeded", "failed", "cancelled")
        except FoundryError:
            return False

    wait_until(over, f"the end of {run_id}", timeout_seconds=900)
    return {**client.runs.get(run_id)}


def test_helm_test_passes(cluster: Cluster) -> None:
    cluster.test()


def test_pods_run_as_they_promise(cluster: Cluster) -> None:
    """Asked inside the containers, not of their manifests."""
    look = (
        "import os,pathlib\n"
        "assert os.getuid() == 65532, os.getuid()\n"
        "for path in ('/opt', '/var', '/etc'):\n"
        "    try: pathlib.Path(path, 'new').write_text('')\n"
        "    except OSError: continue\n"
        "    raise SystemExit(f'{path} is writable')\n"
        "capabilities = [line.split()[1] for line in open('/proc/self/status') if line.startswith('CapEff')]\n"
        "assert int(capabilities[0], 16) == 0, capabilities\n"
        "token = os.path.exists('/var/run/secrets/kubernetes.io/serviceaccount/token')\n"
        "print('token' if token else 'none')\n"
    )
    for component in ("gateway", "rollout", "teacher"):
        pod = cluster.pods(component)[0].metadata.name
        found = cluster.kubectl("exec", pod, "-c", component, "--", "python", "-c", look).strip()
        assert found == ("token" if component == "gateway" else "none"), component


@pytest.mark.timeout(1200)
def test_a_run_is_a_job_and_its_cartridge_answers(
    cluster: Cluster, trained: dict[str, Any], client: FoundryClient
) -> None:
    (job,) = [job for job in cluster.jobs() if job.metadata.labels["foundry.dev/run"] == trained["id"]]
    assert client.runs.get(trained["id"])["job"] == job.metadata.name
    wait_until(lambda: _succeeded(cluster, job.metadata.name), "the Job's end")
    (owner,) = job.metadata.owner_references
    assert owner.kind == "ConfigMap"
    answer = client.chat("handbook", QUESTION, max_tokens=16)
    assert answer.cartridges[0].digest == trained["result"]["digest"]
    assert answer.cartridge_tokens == 64


def test_two_gateways_make_one_job_for_a_run(cluster: Cluster, trained: dict[str, Any]) -> None:
    """Both look at every run; the API server lets one Job have the name."""
    assert len(cluster.pods("gateway")) == 2
    runs = [job.metadata.labels["foundry.dev/run"] for job in cluster.jobs()]
    assert len(runs) == len(set(runs))


def test_the_gateways_account_may_do_its_jobs_and_nothing_else(cluster: Cluster) -> None:
    account = cluster.pods("gateway")[0].spec.service_account_name
    api = cluster.api_as(account)
    batch, core, apps = kube.BatchV1Api(api), kube.CoreV1Api(api), kube.AppsV1Api(api)
    namespace = cluster.namespace
    job = kube.V1Job(
        metadata=kube.V1ObjectMeta(name="tried", labels={"foundry.dev/run": "run-tried234"}),
        spec=kube.V1JobSpec(
            suspend=True,
            template=kube.V1PodTemplateSpec(
                spec=kube.V1PodSpec(
                    restart_policy="Never", containers=[kube.V1Container(name="trainer", image="none:0")]
                )
            ),
        ),
    )
    batch.create_namespaced_job(namespace, job)
    batch.read_namespaced_job("tried", namespace)
    batch.list_namespaced_job(namespace)
    batch.list_namespaced_job(namespace, watch=True, timeout_seconds=1, _preload_content=False)
    batch.delete_namespaced_job("tried", namespace, propagation_policy="Background")
    template = next(name for name in _config_maps(cluster) if "job" in name)
    core.read_namespaced_config_map(template, namespace)

    secret = cluster.core.list_namespaced_secret(namespace).items[0].metadata.name
    pod = cluster.pods("rollout")[0].metadata.name
    other = next(name for name in _config_maps(cluster) if name != template)
    calls = {
        "patch jobs": lambda: batch.patch_namespaced_job("tried", namespace, {}),
        "jobs elsewhere": lambda: batch.create_namespaced_job("default", job),
        "list jobs elsewhere": lambda: batch.list_job_for_all_namespaces(),
        "read the template's neighbour": lambda: core.read_namespaced_config_map(other, namespace),
        "change the template": lambda: core.patch_namespaced_config_map(template, namespace, {}),
        "list config maps": lambda: core.list_namespaced_config_map(namespace),
        "read secrets": lambda: core.read_namespaced_secret(secret, namespace),
        "list secrets": lambda: core.list_namespaced_secret(namespace),
        "list pods": lambda: core.list_namespaced_pod(namespace),
        "read logs": lambda: core.read_namespaced_pod_log(pod, namespace),
        "exec": lambda: core.connect_post_namespaced_pod_exec(pod, namespace, command=["id"]),
        "delete pods": lambda: core.delete_namespaced_pod(pod, namespace),
        "create pods": lambda: core.create_namespaced_pod(
            namespace, kube.V1Pod(metadata=kube.V1ObjectMeta(name="tried"), spec=job.spec.template.spec)
        ),
        "deployments": lambda: apps.list_namespaced_deployment(namespace),
        "nodes": lambda: core.list_node(),
        "tokens": lambda: core.create_namespaced_service_account_token(
            account, namespace, kube.AuthenticationV1TokenRequest(spec=kube.V1TokenRequestSpec(audiences=[]))
        ),
    }
    assert [name for name, call in calls.items() if not refused(call)] == []


@pytest.mark.timeout(1200)
def test_cancel_deletes_the_job(cluster: Cluster, client: FoundryClient) -> None:
    run_id = client.runs.create(**small_run("cancelled", num_steps=200))["id"]
    wait_for_step(client, run_id, 1)
    client.runs.cancel(run_id)
    assert wait(client, run_id)["state"] == "cancelled"
    wait_until(lambda: all(job.metadata.labels["foundry.dev/run"] != run_id for job in cluster.jobs()), "no Job")
    wait_until(lambda: all(run_id not in str(pod.spec.containers[0].args) for pod in cluster.pods()), "no pod")


@pytest.mark.timeout(1200)
def test_a_paused_run_is_resumed(cluster: Cluster, trained: dict[str, Any], client: FoundryClient) -> None:
    run_id = client.runs.create(**small_run("paused"))["id"]
    wait_for_step(client, run_id, 1)
    client.runs.pause(run_id)
    wait_until(lambda: client.runs.get(run_id)["state"] in ("paused", "succeeded"), "the pause")
    assert client.runs.get(run_id)["state"] == "paused"
    client.runs.resume(run_id)
    run = wait(client, run_id)
    assert run["state"] == "succeeded", run
    assert run["result"]["digest"] == trained["result"]["digest"]


@pytest.mark.timeout(1800)
def test_each_pod_is_killed_while_a_run_trains(
    cluster: Cluster, trained: dict[str, Any], client: FoundryClient
) -> None:
    """The run resumes from its checkpoint, and its numbers are those of the calm run."""
    run_id = client.runs.create(**small_run("killed"))["id"]
    wait_for_step(client, run_id, 1)
    (trainer,) = [pod for pod in cluster.pods("trainer") if run_id in str(pod.spec.containers[0].args)]
    victims = [trainer, *(pod for component in COMPONENTS for pod in cluster.pods(component))]
    for pod in victims:
        cluster.kill(pod)
    run = wait(client, run_id)
    assert run["state"] == "succeeded", run
    assert run["attempt"] > 1
    assert run["result"]["digest"] == trained["result"]["digest"]
    for component in COMPONENTS:
        cluster.wait_ready(component, 2 if component == "gateway" else 1)


@pytest.mark.timeout(1800)
def test_rolling_update_and_drain_fail_no_stream(
    cluster: Cluster, trained: dict[str, Any], client: FoundryClient
) -> None:
    cluster.upgrade({"rollout": {"replicas": 2}})
    cluster.wait_ready("rollout", 2)
    _wait_for_rollouts(cluster, 2)
    with streaming(cluster.url, "handbook", clients=2) as streams:
        began, annotation = time.monotonic(), {"podAnnotations": {"updated": "once"}}
        cluster.upgrade({"rollout": {"replicas": 2, **annotation}, "gateway": annotation, "teacher": annotation})
        TIMINGS["rolling update of gateway, rollout and teacher"] = time.monotonic() - began
        before = streams.completed
        began = time.monotonic()
        for component in ("rollout", "gateway"):
            for pod in cluster.pods(component):
                cluster.evict(pod)
                cluster.wait_ready(component, 2)
        TIMINGS["eviction of every gateway and rollout pod"] = time.monotonic() - began
    assert streams.failures == []
    assert streams.completed > before > 0
    TIMINGS["longest stream meanwhile"] = streams.longest_seconds
    TIMINGS["longest gap in a stream meanwhile"] = streams.longest_gap_seconds


@pytest.mark.timeout(1200)
def test_with_api_keys_only_their_owners_are_answered(cluster: Cluster, trained: dict[str, Any]) -> None:
    before = cluster.revision()
    cluster.upgrade({"gateway": {"apiKeys": {"enabled": True}}})
    cluster.wait_ready("gateway", 2)
    # The chat has the operator's key.
    cluster.test()
    pod = cluster.pods("gateway")[0].metadata.name
    gateway = ("exec", pod, "-c", "gateway", "--", "env", "FOUNDRY_GATEWAY=http://127.0.0.1:8000")
    key = cluster.kubectl(*gateway, "foundry", "keys", "create", "--tenant", "acme", "--scope", "query").strip()
    assert cluster.kubectl(*gateway, "foundry", "cartridges", "ls", check=False) == ""
    shown = (*gateway, f"FOUNDRY_API_KEY={key}", "foundry", "cartridges")
    assert json.loads(cluster.kubectl(*shown, "ls", "--json")) == []
    assert cluster.kubectl(*shown, "show", "handbook", check=False) == ""
    cluster.rollback(before)
    cluster.wait_ready("gateway", 2)


@pytest.mark.timeout(1800)
def test_upgrade_and_rollback(cluster: Cluster, trained: dict[str, Any], client: FoundryClient) -> None:
    before = cluster.revision()
    cluster.upgrade({"rollout": {"settings": {"max_sequences": 3}}})
    (pod,) = cluster.pods("rollout")
    assert {env.name: env.value for env in pod.spec.containers[0].env}["FOUNDRY_MAX_SEQUENCES"] == "3"
    assert client.chat("handbook", QUESTION, max_tokens=8).cartridges[0].digest == trained["result"]["digest"]
    cluster.rollback(before)
    cluster.wait_ready("rollout", 2)
    assert all(
        "FOUNDRY_MAX_SEQUENCES" not in {env.name for env in pod.spec.containers[0].env}
        for pod in cluster.pods("rollout")
    )
    assert client.chat("handbook", QUESTION, max_tokens=8).cartridges[0].digest == trained["result"]["digest"]


@pytest.mark.timeout(600)
def test_uninstall_leaves_nothing_but_the_data(cluster: Cluster, client: FoundryClient) -> None:
    """Not even the Job of a run in training. The bundled stores' claims stay, and the key that their records are signed
    with, as docs/deploy.md says."""
    run_id = client.runs.create(**small_run("left", num_steps=200))["id"]
    wait_until(lambda: any(job.metadata.labels["foundry.dev/run"] == run_id for job in cluster.jobs()), "its Job")
    cluster.uninstall()

    def left() -> list[str]:
        # What Kubernetes itself puts into every namespace.
        own = ("ServiceAccount/default", "ConfigMap/kube-root-ca.crt", "Secret/default-token")
        return [name for name in cluster.objects(KINDS) if not name.startswith(own)]

    def is_data(name: str) -> bool:
        return name.startswith("PersistentVolumeClaim/") or (name.startswith("Secret/") and name.endswith("-signing"))

    wait_until(lambda: all(map(is_data, left())), "an empty namespace")
    assert len(left()) == 3, left()


def _succeeded(cluster: Cluster, job: str) -> bool:
    return bool(cluster.batch.read_namespaced_job(job, cluster.namespace).status.succeeded)


def _config_maps(cluster: Cluster) -> list[str]:
    return [each.metadata.name for each in cluster.core.list_namespaced_config_map(cluster.namespace).items]


def _wait_for_rollouts(cluster: Cluster, count: int) -> None:
    line = f"foundry_gateway_rollouts_reachable {float(count)}"
    gateway, *_ = cluster.pods("gateway")
    path = f"/api/v1/namespaces/{cluster.namespace}/pods/{gateway.metadata.name}:9090/proxy/metrics"
    wait_until(lambda: line in cluster.kubectl("get", "--raw", path, check=False), f"{count} rollout servers")
