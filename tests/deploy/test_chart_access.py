"""Who may ask the Kubernetes API for what: the gateway for the Jobs of runs, nobody else for anything."""

from __future__ import annotations

import pytest

from tests.deploy.chart import NAME, VALUES, of_kind, one, pods, rendered, values_of

CLUSTER_WIDE = ("ClusterRole", "ClusterRoleBinding", "Namespace", "CustomResourceDefinition", "PriorityClass")


def mode(name: str) -> str:
    return str(values_of(name).get("trainer", {}).get("mode", "jobs"))


def test_the_gateway_may_make_and_watch_jobs_and_read_their_template() -> None:
    manifests = rendered("default")
    assert one(manifests, "Role")["rules"] == [
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "get", "list", "watch", "delete"]},
        {
            "apiGroups": [""],
            "resources": ["configmaps"],
            "resourceNames": [f"{NAME}-trainer-job"],
            "verbs": ["get"],
        },
    ]
    assert one(manifests, "ConfigMap", "trainer-job")["data"].keys() == {"job.yaml"}
    binding = one(manifests, "RoleBinding")
    assert binding["roleRef"]["name"] == one(manifests, "Role")["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": f"{NAME}-gateway", "namespace": "models"}]


def test_workers_need_no_rights() -> None:
    assert of_kind(rendered("workers"), "Role", "RoleBinding") == []


@pytest.mark.parametrize("name", VALUES)
def test_nothing_reaches_beyond_the_namespace(name: str) -> None:
    assert of_kind(rendered(name), *CLUSTER_WIDE) == []


@pytest.mark.parametrize("name", VALUES)
def test_tokens_are_mounted_where_the_api_is_asked(name: str) -> None:
    manifests = rendered(name)
    with_token = {owner for owner, pod in pods(manifests) if pod["spec"]["automountServiceAccountToken"]}
    assert with_token == ({f"Deployment/{values_name(name)}-gateway"} if mode(name) == "jobs" else set())
    for account in of_kind(manifests, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


def values_name(name: str) -> str:
    return str(values_of(name).get("fullnameOverride", NAME))


def test_each_service_has_an_account_of_its_own() -> None:
    accounts = {account["metadata"]["name"] for account in of_kind(rendered("default"), "ServiceAccount")}
    assert accounts == {f"{NAME}-{service}" for service in ("gateway", "rollout", "teacher", "trainer")}
    elsewhere = one(rendered("external-s3-role"), "Job")
    assert elsewhere["spec"]["template"]["spec"]["serviceAccountName"] == "trains-elsewhere"
