"""Pods: restricted, probed, and given the time that they need to end."""

from __future__ import annotations

import json
import math
from base64 import b64decode
from typing import Any

import pytest
import yaml

from foundry.rpc.tokens import HOLDERS, holder_of
from foundry.store.key_store import KeyText
from tests.deploy.chart import (
    CHART,
    NAME,
    SERVICES,
    VALUES,
    Manifest,
    of_kind,
    one,
    pods,
    render,
    rendered,
    service_pods,
    values_of,
)

APP_VERSION = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]


def containers(pod: Manifest) -> list[Manifest]:
    found: list[Manifest] = pod["spec"].get("initContainers", []) + pod["spec"]["containers"]
    return found


@pytest.mark.parametrize("name", VALUES)
def test_pod_security_is_restricted(name: str) -> None:
    for owner, pod in pods(rendered(name)):
        context = pod["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True, owner
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, owner
        if name != "openshift":
            assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (65532, 65532, 65532), owner
        for container in containers(pod):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, owner
            assert context["readOnlyRootFilesystem"] is True, owner
            assert context["capabilities"] == {"drop": ["ALL"]}, owner
            assert "privileged" not in context
        assert not any(pod["spec"].get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
        assert not any(volume.get("hostPath") for volume in pod["spec"]["volumes"]) or name == "model-host-path"


def test_the_cluster_may_choose_the_user() -> None:
    for _, pod in pods(rendered("openshift")):
        assert not {"runAsUser", "runAsGroup", "fsGroup"} & pod["spec"]["securityContext"].keys()


@pytest.mark.parametrize("name", VALUES)
def test_resources_are_said_and_scratch_space_is_limited(name: str) -> None:
    for owner, pod in pods(rendered(name)):
        for container in containers(pod):
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), owner
            assert "memory" in container["resources"]["limits"], owner
            quantities = [each for kind in ("requests", "limits") for each in container["resources"][kind].values()]
            # Before 1.21 a number is refused in what is applied on the server's side.
            assert {type(each) for each in quantities} == {str}, owner
        for volume in pod["spec"]["volumes"]:
            assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"], owner


@pytest.mark.parametrize("name", VALUES)
def test_mounts_have_their_volumes(name: str) -> None:
    for owner, pod in pods(rendered(name)):
        volumes = [volume["name"] for volume in pod["spec"]["volumes"]]
        assert len(set(volumes)) == len(volumes), owner
        mounted = {mount["name"] for container in containers(pod) for mount in container["volumeMounts"]}
        claimed = {"data"} if owner.startswith("StatefulSet") else set()
        assert mounted - claimed == set(volumes) - claimed, owner
        for container in containers(pod):
            paths = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert len(set(paths)) == len(paths), owner


@pytest.mark.parametrize("name", VALUES)
def test_servers_are_probed(name: str) -> None:
    for owner, pod in pods(rendered(name)):
        if owner.startswith(("Pod/", "Job/")) and pod["metadata"]["labels"]["app.kubernetes.io/component"] != "trainer":
            continue
        (container,) = pod["spec"]["containers"]
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys(), owner


def probes(name: str, kube: str) -> Manifest:
    (container,) = service_pods(rendered(name, kube))["rollout"]["spec"]["containers"]
    return {kind: container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}


def test_health_is_asked_by_the_kubelet_where_it_can() -> None:
    native = probes("default", "1.24.0")
    assert native["readiness"]["grpc"] == native["startup"]["grpc"] == {"port": 7001}
    for asked in (probes("default", "1.23.0"), probes("tls-existing", "1.35.0")):
        assert asked["readiness"]["exec"] == {"command": ["python", "-m", "foundry.rpc.probe"]}
        assert "grpc" not in asked["readiness"]


def test_a_server_that_is_drained_is_alive() -> None:
    for kube in ("1.20.2", "1.35.0"):
        assert probes("default", kube)["liveness"]["exec"]["command"][-1] == "--live"


def test_the_gateway_takes_traffic_without_the_store() -> None:
    (container,) = service_pods(rendered("default"))["gateway"]["spec"]["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz?exclude=store"
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"


def test_a_gateway_with_a_certificate_is_asked_by_https() -> None:
    manifests = rendered("https")
    gateway = service_pods(manifests)["gateway"]["spec"]
    (container,) = gateway["containers"]
    for kind in ("startup", "readiness", "liveness"):
        assert container[f"{kind}Probe"]["httpGet"]["scheme"] == "HTTPS"
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "https"]
    files = {each["value"] for each in container["env"] if each["name"].startswith("FOUNDRY_HTTPS_")}
    assert files == {f"{mount['mountPath']}/tls.{end}" for end in ("crt", "key")}
    (secret,) = [volume["secret"] for volume in gateway["volumes"] if volume["name"] == "https"]
    assert secret["secretName"] == "llm-example-tls"
    for pod in of_kind(manifests, "Pod"):
        (tester,) = pod["spec"]["containers"]
        assert tester["args"][1] == f"https://{NAME}-gateway:8000"
        (mounted,) = [volume["secret"] for volume in pod["spec"]["volumes"] if volume["name"] == "https"]
        assert mounted["items"] == [{"key": "tls.crt", "path": "tls.crt"}]


@pytest.mark.parametrize("name", VALUES)
def test_grace_periods_add_up(name: str) -> None:
    for service, pod in service_pods(rendered(name)).items():
        (container,) = pod["spec"]["containers"]
        variables = {variable["name"]: variable.get("value") for variable in container["env"]}
        hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
        grace_seconds = math.ceil(float(variables["FOUNDRY_GRACE_SECONDS"]))
        if service == "rollout":
            wait, drain = hook[2].split("; ")
            assert hook[:2] == ["sh", "-c"]
            # What is not through by then is ended at SIGTERM: the drain's time is that of the calls in flight.
            assert drain == f"exec python -m foundry.rpc.probe --drain {grace_seconds}"
            hook = wait.split()
        assert hook[0] == "sleep"
        assert pod["spec"]["terminationGracePeriodSeconds"] == float(hook[1]) + grace_seconds + 10, service


def test_grace_periods_follow_the_settings() -> None:
    grace = service_pods(rendered("jobs-gpu"))["rollout"]["spec"]["terminationGracePeriodSeconds"]
    assert grace == 5 + 301 + 10
    long = {"rollout": {"preStopSeconds": 15, "settings": {"grace_seconds": 600}}}
    deployment = one(render(long), "Deployment", "rollout")
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 625


@pytest.mark.parametrize("name", VALUES)
def test_selectors_match_their_pods_alone(name: str) -> None:
    manifests = rendered(name)
    found = pods(manifests)
    for manifest in of_kind(manifests, "Deployment", "StatefulSet", "PodDisruptionBudget", "PodMonitor", "Service"):
        selector = manifest["spec"]["selector"]
        wanted = selector if manifest["kind"] == "Service" else selector["matchLabels"]
        matched = [owner for owner, pod in found if wanted.items() <= pod["metadata"]["labels"].items()]
        assert len(matched) == 1, (manifest["kind"], manifest["metadata"]["name"], matched)


@pytest.mark.parametrize("name", VALUES)
def test_services_lead_to_ports_that_pods_have(name: str) -> None:
    manifests = rendered(name)
    for service in of_kind(manifests, "Service"):
        (pod,) = [
            pod
            for _, pod in pods(manifests)
            if service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        ]
        named = {port["name"] for container in pod["spec"]["containers"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= named


def test_updates_take_nothing_away() -> None:
    for deployment in of_kind(rendered("workers"), "Deployment"):
        assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_autoscalers_alone_decide_how_many() -> None:
    for name in ("hpa", "keda"):
        for service in ("gateway", "rollout", "teacher"):
            assert "replicas" not in one(rendered(name), "Deployment", service)["spec"]


def test_gpus_are_asked_for() -> None:
    found = service_pods(rendered("jobs-gpu"))
    limits = {name: found[name]["spec"]["containers"][0]["resources"]["limits"] for name in SERVICES}
    assert limits["rollout"]["nvidia.com/gpu"] == "1"
    assert limits["rollout"]["memory"] == "64Gi"
    assert limits["trainer"]["example.com/gpu"] == "2"
    assert "nvidia.com/gpu" not in limits["gateway"]


def rpc_tokens(pod: Manifest) -> tuple[str, set[str]] | None:
    """Secret and keys that a service's pod has where its setting says; None without the setting."""
    (container,) = pod["spec"]["containers"]
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    if (directory := variables.get("FOUNDRY_RPC_TOKENS_DIRECTORY")) is None:
        assert "rpc-tokens" not in mounts.values()
        return None
    (volume,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == mounts[directory]]
    assert all(item["key"] == item["path"] for item in volume["secret"]["items"])
    return volume["secret"]["secretName"], {item["key"] for item in volume["secret"]["items"]}


def test_each_pod_has_the_tokens_that_it_needs_and_no_other() -> None:
    for name in ("default", "workers", "tls-cert-manager"):
        manifests = rendered(name)
        for service, pod in service_pods(manifests).items():
            assert rpc_tokens(pod) == (f"{NAME}-rpc", set(HOLDERS[holder_of(service)])), service
        others = [pod for _, pod in pods(manifests) if pod not in service_pods(manifests).values()]
        assert others
        assert f"{NAME}-rpc" not in json.dumps(others)


def test_tokens_are_random_ones_or_those_of_a_secret_or_off() -> None:
    made = one(render(), "Secret", "rpc")["data"]
    assert made.keys() == set(HOLDERS["servers"])
    decoded = {b64decode(token).decode() for token in made.values()}
    assert len(decoded) == len(made)
    assert all(len(token) >= 32 and token.isalnum() for token in decoded)
    for tokens, secret in (({"existingSecret": "mine"}, "mine"), ({"enabled": False}, None)):
        manifests = render({"rpc": {"tokens": tokens}})
        assert f"{NAME}-rpc" not in {manifest["metadata"]["name"] for manifest in of_kind(manifests, "Secret")}
        found = rpc_tokens(one(manifests, "Deployment", "rollout")["spec"]["template"])
        assert (found and found[0]) == secret


def test_gateway_and_the_chat_test_have_the_operators_key_and_nobody_else() -> None:
    manifests = rendered("default")
    (key,) = one(manifests, "Secret", "api-key")["data"].values()
    KeyText.parse(b64decode(key).decode())
    with_key = {owner for owner, pod in pods(manifests) if f"{NAME}-api-key" in json.dumps(pod)}
    assert with_key == {f"Deployment/{NAME}-gateway", f"Pod/{NAME}-test-chat"}


@pytest.mark.parametrize(("values", "secret"), [({"existingSecret": "mine"}, "mine"), ({"enabled": False}, None)])
def test_the_operators_key_is_of_a_secret_or_off(values: dict[str, Any], secret: str | None) -> None:
    manifests = render({"gateway": {"apiKeys": values}})
    assert f"{NAME}-api-key" not in {manifest["metadata"]["name"] for manifest in of_kind(manifests, "Secret")}
    pod = one(manifests, "Deployment", "gateway")["spec"]["template"]["spec"]
    found = [each["secret"]["secretName"] for each in pod["volumes"] if each["name"] == "api-key"]
    assert found == ([secret] if secret else [])
    named = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
    path = "/run/secrets/foundry/api-key/api-key" if secret else None
    assert named.get("FOUNDRY_ADMIN_KEY_FILE") == path
    assert named.get("FOUNDRY_API_KEYS") == ("true" if secret else None)


@pytest.mark.parametrize(
    ("signing", "secret"), [({}, f"{NAME}-signing"), ({"existingSecret": "mine"}, "mine"), ({"enabled": False}, None)]
)
def test_records_are_signed_by_a_random_key_or_that_of_a_secret_or_not(signing: Manifest, secret: str | None) -> None:
    manifests = render(values_of("workers") | {"store": {"signing": signing}})
    made = [each for each in of_kind(manifests, "Secret") if each["metadata"]["name"] == f"{NAME}-signing"]
    assert len(made) == (not signing)
    for each in made:
        assert each["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
        assert len(b64decode(each["data"]["keys"])) >= 32
    for service, pod in service_pods(manifests).items():
        (container,) = pod["spec"]["containers"]
        variables = {variable["name"]: variable.get("value") for variable in container["env"]}
        file = variables.get("FOUNDRY_STORE__SIGNING_KEY_FILE")
        volumes = [volume["secret"]["secretName"] for volume in pod["spec"]["volumes"] if volume["name"] == "signing"]
        assert volumes == ([secret] if secret and service != "teacher" else []), service
        assert (file is not None) == bool(volumes), service


def test_a_changed_password_rolls_the_pods() -> None:
    def rendered_with(password: str) -> dict[str, Manifest]:
        return dict(pods(render(values_of("workers") | {"redis": {"auth": {"password": password}}})))

    first, second = rendered_with("one"), rendered_with("two")
    changed = {owner.removeprefix(f"Deployment/{NAME}-") for owner in first if first[owner] != second[owner]}
    assert changed == {"gateway", "rollout", "trainer", f"StatefulSet/{NAME}-redis"}


def test_without_a_cluster_pods_are_the_same_each_time() -> None:
    """A random password must not roll them."""
    assert [pod for _, pod in pods(render())] == [pod for _, pod in pods(render())]


def rollout_images(values: Manifest) -> set[str]:
    """Images of every container that has the rollout's, the Job's that fetches the model too."""
    found = [container["image"] for _, pod in pods(render(values)) for container in containers(pod)]
    return {image for image in found if "/rollout" in image}


def test_the_engine_chooses_the_rollouts_image() -> None:
    values = values_of("vllm-gpu")
    assert rollout_images(values) == {"registry.example/ml/cartridge-foundry/rollout:1.2.3-vllm"}
    for engine in ("torch", "auto"):
        values["rollout"]["settings"]["engine"] = engine
        assert rollout_images(values) == {"registry.example/ml/cartridge-foundry/rollout:1.2.3"}
    values = {"rollout": {"settings": {"engine": "vllm"}}}
    assert rollout_images(values) == {f"cartridge-foundry/rollout:{APP_VERSION}-vllm"}


def test_an_image_that_is_named_is_taken_as_it_is() -> None:
    assert rollout_images(values_of("vllm-cpu")) == {"cartridge-foundry/rollout:1.2.3-of-mine"}
    digest = f"sha256:{'0' * 64}"
    values = {"rollout": {"settings": {"engine": "vllm"}, "image": {"digest": digest}}}
    assert rollout_images(values) == {f"cartridge-foundry/rollout@{digest}"}


def test_vllm_has_the_time_to_compile_before_it_is_restarted() -> None:
    (container,) = service_pods(rendered("vllm-gpu"))["rollout"]["spec"]["containers"]
    probe = container["startupProbe"]
    # It took up to 110 s on an H100, without reading the weights.
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 10 * 60


def test_the_model_is_read_only_at_its_place() -> None:
    for name in ("default", "model-cache", "model-claim", "model-host-path", "model-hub"):
        for service in ("rollout", "teacher", "trainer"):
            (container,) = service_pods(rendered(name))[service]["spec"]["containers"]
            (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "model"]
            assert mount["mountPath"] == "/model"
            assert mount["readOnly"] is True


def model_job(**values: Manifest) -> Manifest:
    (found,) = of_kind(render({"model": {"hub": {"id": "a/b"}}, **values}), "Job")
    return found


def test_another_model_has_a_folder_and_a_job_of_its_own() -> None:
    one, two = (model_job(model={"hub": {"id": "a/b", "revision": revision}}) for revision in ("one", "two"))
    assert one["metadata"]["name"] != two["metadata"]["name"]


def test_an_upgrade_makes_another_job_where_it_would_change_the_pod_of_one() -> None:
    """Kubernetes refuses such a change, and with it the release."""
    before = model_job()
    assert model_job()["metadata"]["name"] == before["metadata"]["name"]
    for values in ({"global": {"image": {"tag": "2.0"}}}, {"rollout": {"settings": {"engine": "vllm"}}}):
        after = model_job(**values)
        assert after["spec"] != before["spec"]
        assert after["metadata"]["name"] != before["metadata"]["name"]
        assert len(after["metadata"]["name"]) <= 63


def test_the_model_is_fetched_though_the_image_knows_no_hub() -> None:
    assert "HF_HUB_OFFLINE=1" in (CHART.parents[2] / "services" / "rollout" / "Dockerfile").read_text()
    (container,) = model_job()["spec"]["template"]["spec"]["containers"]
    assert {"name": "HF_HUB_OFFLINE", "value": "0"} in container["env"]
