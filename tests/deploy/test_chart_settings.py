"""What the chart tells the services is what their settings understand; what users tell the chart is checked."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python import HelmError
from pydantic import BaseModel

from foundry.settings import ServiceSettings
from services.gateway.settings import GatewaySettings
from services.rollout.settings import RolloutSettings
from services.teacher.settings import TeacherSettings
from services.trainer.settings import TrainerSettings
from tests.deploy.chart import CHART, NAME, VALUES, Manifest, of_kind, one, pods, render, rendered, service_pods

SETTINGS: dict[str, type[ServiceSettings]] = {
    "gateway": GatewaySettings,
    "rollout": RolloutSettings,
    "teacher": TeacherSettings,
    "trainer": TrainerSettings,
}


def variables(pod: Manifest) -> dict[str, str]:
    (container,) = pod["spec"]["containers"]
    return {entry["name"]: entry["value"] for entry in container["env"] if entry["name"].startswith("FOUNDRY_")}


def known_variables(settings: type[BaseModel], prefix: str = "FOUNDRY_") -> Iterator[str]:
    """Every variable that the settings read: pydantic passes over those that it does not know."""
    for name, field in settings.model_fields.items():
        yield f"{prefix}{name}".upper()
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from known_variables(kind, f"{prefix}{name}__")


def settings_of(service: str, values: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in [name for name in os.environ if name.startswith("FOUNDRY_")]:
        monkeypatch.delenv(name)
    given = variables(service_pods(rendered(values))[service])
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return SETTINGS[service]()


@pytest.mark.parametrize("service", SETTINGS)
@pytest.mark.parametrize("values", VALUES)
def test_every_variable_is_a_setting(values: str, service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = variables(service_pods(rendered(values))[service])
    assert set(given) - set(known_variables(SETTINGS[service])) == set()
    settings = settings_of(service, values, monkeypatch)
    assert settings.metrics_port == 9090
    assert settings.listen.startswith("0.0.0.0:")


def test_a_wrong_name_would_be_seen() -> None:
    known = set(known_variables(RolloutSettings))
    assert {"FOUNDRY_STORE__KEEP_HOT", "FOUNDRY_MAX_SEQUENCES"} <= known
    assert not {"FOUNDRY_MAX_SEQUENCE", "FOUNDRY_STORE_KEEP_HOT"} & known


def test_services_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = {
        service["metadata"]["name"]: service["spec"]["ports"][0]["port"]
        for service in of_kind(rendered("default"), "Service")
    }
    for name in ("gateway", "trainer"):
        settings = settings_of(name, "default", monkeypatch)
        for address in (*settings.rollout_addresses, settings.teacher_address):
            host, _, port = address.partition(":")
            assert ports[host] == int(port)
    for name in ("gateway", "rollout", "trainer"):
        store = settings_of(name, "default", monkeypatch).store
        assert store.redis_url.get_secret_value() == f"redis://{NAME}-redis:{ports[f'{NAME}-redis']}/0"
        assert store.objects_endpoint == f"http://{NAME}-objects:{ports[f'{NAME}-objects']}"


def test_external_stores_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    store = settings_of("rollout", "external-redis-tls", monkeypatch).store
    assert store.redis_url.get_secret_value() == "rediss://redis.example:6380/2"
    assert (store.redis_username, store.redis_ca_file) == ("trainers", Path("/run/secrets/foundry/redis-tls/ca.crt"))
    store = settings_of("rollout", "external-s3", monkeypatch).store
    assert (store.objects_url, store.objects_region) == ("s3://cartridges/team", "eu-west-1")
    assert store.objects_endpoint == "https://s3.example:9443"
    assert settings_of("trainer", "objects-claim", monkeypatch).store.objects_url == "file:///objects"


def test_settings_of_users_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of("rollout", "jobs-gpu", monkeypatch)
    assert (settings.dtype, settings.cartridge_budget_bytes, settings.grace_seconds) == ("bfloat16", 17179869184, 300.5)
    assert settings.device == "cuda"
    assert settings_of("teacher", "jobs-gpu", monkeypatch).device == "cuda:0"
    assert settings_of("rollout", "default", monkeypatch).device == "cpu"


def test_the_engines_settings_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of("rollout", "vllm-gpu", monkeypatch)
    assert (settings.engine, settings.device, settings.max_sequences) == ("vllm", "cuda", 256)
    assert (settings.vllm.gpu_memory_utilization, settings.vllm.max_context_tokens) == (0.85, 16384)
    assert (settings.vllm.kv_bytes, settings.vllm.cuda_graphs) == (None, True)
    settings = settings_of("rollout", "vllm-cpu", monkeypatch)
    assert (settings.engine, settings.device) == ("vllm", "cpu")
    assert (settings.vllm.kv_bytes, settings.vllm.cuda_graphs) == (1073741824, False)


@pytest.mark.parametrize("values", VALUES)
def test_files_that_settings_name_are_mounted(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for service, pod in service_pods(rendered(values)).items():
        mounts = {mount["mountPath"]: mount for mount in pod["spec"]["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for name, value in variables(pod).items():
            if name.endswith("_FILE"):
                directory, _, file = value.rpartition("/")
                volume = volumes[mounts[directory]["name"]]["secret"]
                items = [item["path"] for item in volume.get("items", [])]
                assert not items or file in items, (service, name)


@pytest.mark.parametrize("values", VALUES)
def test_secrets_reach_no_variable(values: str) -> None:
    manifests = rendered(values)
    secrets = {value for secret in of_kind(manifests, "Secret") for value in secret["data"].values()}
    for owner, pod in pods(manifests):
        for container in pod["spec"].get("initContainers", []) + pod["spec"]["containers"]:
            for entry in container.get("env", []):
                assert "secretKeyRef" not in entry.get("valueFrom", {}), owner
                assert entry.get("value") not in secrets
                assert not re.search("(PASSWORD|SECRET_ACCESS_KEY|TOKEN)$", entry["name"]), owner


def test_the_bundled_user_has_the_documented_rights() -> None:
    page = (CHART.parents[2] / "docs" / "store.md").read_text()
    (documented,) = re.findall(r"^user foundry on >PASSWORD (.*)$", page, re.MULTILINE)
    configuration = one(rendered("default"), "ConfigMap", "redis")["data"]
    assert f"user foundry on #$hash {documented}" in configuration["start.sh"]
    assert "maxmemory-policy noeviction" in configuration["valkey.conf"]
    assert "appendonly yes" in configuration["valkey.conf"]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"rolout": {}}, "rolout"),
        ({"rollout": {"settings": {"max_seqences": 3}}}, "max_seqences"),
        ({"rollout": {"settings": {"max_sequences": 0}}}, "max_sequences"),
        ({"rollout": {"settings": {"max_sequences": "many"}}}, "max_sequences"),
        ({"rollout": {"settings": {"listen": "0.0.0.0:1"}}}, "listen"),
        ({"rollout": {"settings": {"engine": "vlm"}}}, "engine"),
        ({"rollout": {"settings": {"vllm": {"kv_byte": 1}}}}, "kv_byte"),
        ({"store": {"settings": {"redis_url": "redis://x"}}}, "redis_url"),
        ({"gateway": {"settings": {"grace_seconds": None}}}, "grace_seconds"),
        ({"gateway": {"probes": {"liveness": {"periodSecond": 3}}}}, "periodSecond"),
        ({"gateway": {"tolerations": [{"efect": "NoSchedule"}]}}, "efect"),
        ({"trainer": {"extraVolumes": [{"name": "x", "emptyDir": {"sizelimit": "1Gi"}}]}}, "sizelimit"),
        ({"trainer": {"mode": "job"}}, "mode"),
        ({"redis": {"bundled": {"persistence": {"sise": "1Gi"}}}}, "sise"),
        ({"redis": {"url": "redis://user:password@host"}}, "url"),
        ({"networkPolicy": {"kubeAPI": {"to": [{"ipBlok": {}}]}}}, "ipBlok"),
        ({"tls": {"certManager": {"issuerRef": {"nam": "x"}}}}, "nam"),
    ],
)
def test_typos_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(HelmError, match=complaint):
        render(values)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"redis": {"url": "redis://host:6379/0"}}, "redis.bundled.enabled"),
        ({"redis": {"bundled": {"enabled": False}}}, "redis.url"),
        ({"redis": {"username": "other"}}, "bundled Valkey"),
        ({"redis": {"auth": {"password": "x", "existingSecret": "y"}}}, "not both"),
        ({"objects": {"url": "s3://bucket"}}, "exactly one"),
        ({"objects": {"bundled": {"enabled": False}}}, "set are: none"),
        ({"objects": {"region": "eu-west-1"}}, "are for objects.url"),
        ({"objects": {"auth": {"accessKeyId": "x"}}}, "belong together"),
        ({"model": {"existingClaim": "x", "hub": {"id": "a/b"}}}, "set one of"),
        ({"rollout": {"autoscaling": {"enabled": True}, "keda": {"enabled": True}}}, "enable one"),
        ({"rollout": {"keda": {"enabled": True}}}, "serverAddress"),
        ({"tls": {"enabled": True, "certManager": {"enabled": False}}}, "tls.existingSecrets"),
        ({"gateway": {"ingress": {"enabled": True}}}, "at least one host"),
        ({"gateway": {"httpRoute": {"enabled": True}}}, "name the Gateway"),
    ],
)
def test_values_that_contradict_each_other_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(HelmError, match=complaint):
        render(values)


def test_the_schema_is_closed_and_describes_every_value() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def undescribed(node: dict[str, Any], path: str) -> Iterator[str]:
        for name, below in node.get("properties", {}).items():
            if "description" not in below:
                yield from undescribed(below, f"{path}.{name}") if "properties" in below else (f"{path}.{name}",)

    def open_ones(node: Any, path: str) -> Iterator[str]:
        if isinstance(node, dict):
            if "properties" in node and "type" in node and node.get("additionalProperties") is not False:
                yield path
            for name, below in node.items():
                yield from open_ones(below, f"{path}.{name}")

    assert list(undescribed(schema, "")) == []
    assert list(open_ones(schema, "")) == []


def test_values_say_what_the_code_says_where_it_says_the_same() -> None:
    """A pod's time to end is computed from them, so values.yaml must give them."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for service in SETTINGS:
        assert "grace_seconds" in values[service]["settings"]
