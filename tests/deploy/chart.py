"""The Helm chart, rendered in this process as `helm template` does."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart, _native

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "cartridge-foundry"
VALUES = {path.stem: path for path in sorted(Path(__file__).with_name("values").glob("*.yaml"))}
NEWEST = "1.35.0"
RELEASE = "rel"
NAMESPACE = "models"
NAME = f"{RELEASE}-cartridge-foundry"
SERVICES = ("gateway", "rollout", "teacher", "trainer")

Manifest = dict[str, Any]


def values_of(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(VALUES[name].read_text())
    return values


def render(values: dict[str, Any] | None = None, *, kube: str = NEWEST, chart: Path = CHART) -> list[Manifest]:
    """All manifests of the chart with `values`, those of `helm test` too. Raises HelmError."""
    # `Chart.render` has no parameter for the version of Kubernetes, which the library takes.
    options = json.dumps({"name": RELEASE, "namespace": NAMESPACE, "kube_version": f"v{kube}"})
    with Chart.load(chart) as loaded:
        files = json.loads(_native.call_string("helm_render", loaded._raw(), json.dumps(values or {}), options))
    texts = [text for path, text in sorted(files.items()) if not path.endswith(".txt")]
    return [manifest for text in texts for manifest in yaml.load_all(text, Loader=yaml.CSafeLoader) if manifest]


@cache
def rendered(name: str, kube: str = NEWEST) -> list[Manifest]:
    """Manifests of one of the sets in values/, with the Job that the gateway makes of the template."""
    manifests = render(values_of(name), kube=kube)
    return manifests + [job_of(manifest) for manifest in manifests if "job.yaml" in manifest.get("data", {})]


def job_of(template: Manifest) -> Manifest:
    """What the gateway makes of the ConfigMap."""
    job: Manifest = yaml.safe_load(template["data"]["job.yaml"])
    base = job["metadata"].pop("generateName")
    job["metadata"] |= {"name": f"{base}0123", "namespace": NAMESPACE}
    return job


def one(manifests: list[Manifest], kind: str, name: str = "") -> Manifest:
    """The only manifest of this kind, or the one of the component `name`."""
    (found,) = [m for m in manifests if m["kind"] == kind and (not name or m["metadata"]["name"] == f"{NAME}-{name}")]
    return found


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def pods(manifests: list[Manifest]) -> list[tuple[str, Manifest]]:
    """Every pod that the release or its gateway makes, as (owner, pod template)."""
    templates = [
        (f"{manifest['kind']}/{manifest['metadata']['name']}", manifest["spec"]["template"])
        for manifest in of_kind(manifests, "Deployment", "StatefulSet", "Job")
    ]
    return templates + [(f"Pod/{pod['metadata']['name']}", pod) for pod in of_kind(manifests, "Pod")]


def service_pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """The pods of the four services, by their name."""
    found = {pod["metadata"]["labels"]["app.kubernetes.io/component"]: pod for _, pod in pods(manifests)}
    return {name: found[name] for name in SERVICES}
