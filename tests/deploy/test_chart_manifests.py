"""Whatever values the chart is given, Kubernetes accepts what it renders."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from shutil import copytree

import helm_python
import kubernetes_validate
import pytest
import yaml

from services.trainer.exits import FAILED, RANK_LOST
from tests.deploy.chart import CHART, NAME, VALUES, Manifest, of_kind, one, render, rendered, values_of

KUBERNETES = ("1.29.0", "1.30.0", "1.31.0", "1.32.0", "1.33.0", "1.34.0", "1.35.0")
# Kinds of other projects, of which kubernetes-validate knows nothing, with what their definitions require in `spec`.
CUSTOM: dict[tuple[str, str], set[str]] = {
    ("cert-manager.io/v1", "Certificate"): {"issuerRef", "secretName"},
    ("cert-manager.io/v1", "Issuer"): set(),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): {"parentRefs", "rules"},
    ("keda.sh/v1alpha1", "ScaledObject"): {"scaleTargetRef", "triggers"},
    ("monitoring.coreos.com/v1", "PodMonitor"): {"podMetricsEndpoints", "selector"},
    ("monitoring.coreos.com/v1", "PrometheusRule"): {"groups"},
}


def test_the_chart_is_of_this_release() -> None:
    project = tomllib.loads((CHART.parents[2] / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == project["version"]


@pytest.mark.parametrize("name", VALUES)
def test_lints(name: str) -> None:
    report = helm_python.lint(CHART, values_of(name), strict=True, namespace="models")
    assert [m["error"] for m in report["messages"] if m["severity"] > 1] == []
    assert report["errors"] == []


@pytest.mark.parametrize("kube", KUBERNETES)
def test_every_manifest_is_valid(kube: str) -> None:
    # Most are the same in most sets.
    distinct = {json.dumps(manifest): name for name in VALUES for manifest in rendered(name, kube)}
    for text, name in distinct.items():
        manifest = json.loads(text)
        problems = list(problems_of(manifest, kube))
        assert problems == [], f"{name}: {manifest['kind']}/{manifest['metadata']['name']}"
    assert len(distinct) > 5 * len(VALUES)


def test_a_wrong_field_would_be_seen() -> None:
    deployment = one(render(), "Deployment", "gateway")
    deployment["spec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    assert list(problems_of(deployment, KUBERNETES[0])) != []


def problems_of(manifest: Manifest, kube: str) -> Iterator[str]:
    key = (manifest["apiVersion"], manifest["kind"])
    if key in CUSTOM:
        yield from (f"spec.{field} is missing" for field in CUSTOM[key] if not manifest["spec"].get(field))
        return
    try:
        kubernetes_validate.validate(manifest, kube, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{error.json_path}: {error.message}"


@pytest.fixture(autouse=True, scope="module")
def _schemas_are_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kubernetes_validate.utils, "schema_contents", cache(kubernetes_validate.utils.schema_contents))
        yield


@pytest.mark.parametrize(
    ("kube", "expected"),
    [
        ("1.20.2", {"PodDisruptionBudget": "policy/v1beta1", "HorizontalPodAutoscaler": "autoscaling/v2beta2"}),
        ("1.22.0", {"PodDisruptionBudget": "policy/v1", "HorizontalPodAutoscaler": "autoscaling/v2beta2"}),
        ("1.23.0", {"PodDisruptionBudget": "policy/v1", "HorizontalPodAutoscaler": "autoscaling/v2"}),
    ],
)
def test_api_versions_are_those_of_the_cluster(kube: str, expected: dict[str, str]) -> None:
    for kind, api_version in expected.items():
        found = of_kind(rendered("hpa", kube), kind)
        assert {manifest["apiVersion"] for manifest in found} == {api_version}
        assert len(found) == 3


def test_a_failed_run_is_not_tried_again_where_jobs_can_say_so() -> None:
    assert "podFailurePolicy" not in one(rendered("default", "1.25.0"), "Job")["spec"]
    failed, bereaved, evicted = one(rendered("default", "1.26.0"), "Job")["spec"]["podFailurePolicy"]["rules"]
    assert failed == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "trainer", "operator": "In", "values": [FAILED]},
    }
    assert bereaved == {
        "action": "Ignore",
        "onExitCodes": {"containerName": "trainer", "operator": "In", "values": [RANK_LOST]},
    }
    assert evicted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


@pytest.mark.parametrize("name", VALUES)
def test_names_are_unique_and_ports_say_their_protocol(name: str) -> None:
    manifests = rendered(name)
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests]
    assert len(set(names)) == len(names)
    ports = [port for service in of_kind(manifests, "Service") for port in service["spec"]["ports"]]
    assert ports
    assert {port["protocol"] for port in ports} == {"TCP"}


@pytest.mark.parametrize("name", VALUES)
def test_everything_is_labelled_and_namespaced(name: str) -> None:
    for manifest in rendered(name):
        labels = manifest["metadata"]["labels"]
        assert {f"app.kubernetes.io/{label}" for label in ("name", "instance", "component")} <= labels.keys()
        assert manifest["metadata"]["namespace"] == "models"


def test_services_of_model_servers_are_headless() -> None:
    for service in ("rollout", "teacher"):
        spec = one(rendered("default"), "Service", service)["spec"]
        assert spec["clusterIP"] == "None"
        assert spec["publishNotReadyAddresses"] is False


def test_certificates_hold_the_names_that_clients_verify() -> None:
    manifests = rendered("tls-cert-manager")
    for service in ("gateway", "rollout", "teacher", "trainer"):
        certificate = one(manifests, "Certificate", service)["spec"]
        assert f"{NAME}-{service}" in certificate["dnsNames"]
        assert f"{NAME}-{service}.models.svc" in certificate["dnsNames"]
        assert {"server auth", "client auth"} <= set(certificate["usages"])


def test_rules_and_dashboards_are_the_files_of_the_chart(tmp_path: Path) -> None:
    chart = tmp_path / "cartridge-foundry"
    copytree(CHART, chart)
    (chart / "files" / "rules.yaml").write_text(
        'groups: [{name: g, rules: [{alert: A, expr: "up{a=\\"{{b}}\\"} == 0"}]}]'
    )
    (chart / "files" / "dashboards").mkdir(exist_ok=True)
    (chart / "files" / "dashboards" / "added.json").write_text('{"title": "{{added}}"}')
    manifests = render({"monitoring": {"rules": {"enabled": True}, "dashboards": {"enabled": True}}}, chart=chart)
    assert one(manifests, "PrometheusRule")["spec"]["groups"][0]["rules"][0]["expr"] == 'up{a="{{b}}"} == 0'
    dashboard = one(manifests, "ConfigMap", "dashboard-added")
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert dashboard["data"]["added.json"].strip() == '{"title": "{{added}}"}'
