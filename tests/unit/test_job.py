"""The Job of a run: from the template, and back from what the API says."""

from __future__ import annotations

import json
from typing import Any

import kubernetes_validate
import pytest

from foundry.errors import InvalidArgument
from foundry.store import Resources
from services.gateway.kubernetes.job import Job, JobTemplate

RUN = "run-k3v7q2xa"


def template(*, metadata: dict[str, Any] | None = None, **trainer: Any) -> JobTemplate:
    containers = [{"name": "sidecar"}, {"name": "trainer", "args": ["--dtype", "auto"], **trainer}]
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata or {"labels": {"app": "foundry"}},
        "spec": {"backoffLimit": 6, "template": {"spec": {"containers": containers}}},
    }
    return JobTemplate.parse("templates", "uid-1", {"job.yaml": json.dumps(job)})


def test_a_job_is_its_template_for_one_run() -> None:
    made = template()
    job = made.job(RUN, None)
    assert job["metadata"] == {
        "name": "foundry-run-k3v7q2xa",
        "labels": {"app": "foundry", "foundry.dev/run": RUN},
        "ownerReferences": [{"apiVersion": "v1", "kind": "ConfigMap", "name": "templates", "uid": "uid-1"}],
    }
    assert job["spec"]["template"]["metadata"]["labels"] == {"foundry.dev/run": RUN}
    sidecar, trainer = job["spec"]["template"]["spec"]["containers"]
    assert sidecar == {"name": "sidecar"}
    assert trainer == {"name": "trainer", "args": ["--dtype", "auto", "--run", RUN]}
    assert job["spec"]["backoffLimit"] == 6
    assert made.job("run-other", None)["metadata"]["labels"]["foundry.dev/run"] == "run-other"
    assert made.job(RUN, None) == job


def test_the_template_may_name_its_jobs() -> None:
    job = template(metadata={"generateName": "acme-train-"}).job(RUN, None)
    assert job["metadata"]["name"] == "acme-train-k3v7q2xa"
    assert "generateName" not in job["metadata"]
    with pytest.raises(InvalidArgument, match="generateName"):
        template(metadata={"generateName": "a" * 55}).job(RUN, None)


def given(asked: Resources, **before: Any) -> Any:
    job = template(**before).job(RUN, asked)
    return job["spec"]["template"]["spec"]["containers"][1]["resources"]


def test_a_run_gets_what_it_asks_for_and_the_rest_from_the_template() -> None:
    usual = {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"nvidia.com/gpu": "1", "memory": "2Gi"}}
    assert given(Resources(memory="16Gi"), resources=usual) == {
        "requests": {"cpu": "1", "memory": "16Gi"},
        "limits": {"nvidia.com/gpu": "1", "memory": "16Gi"},
    }
    asked = {"cpu": "500m", "nvidia.com/gpu": "2"}
    assert given(Resources(cpu="500m", gpus=2)) == {"requests": asked, "limits": asked}


def test_no_gpu_is_none_at_all() -> None:
    usual = {"limits": {"nvidia.com/gpu": "1"}}
    assert given(Resources(gpus=0), resources=usual) == {"requests": {}, "limits": {}}


def launched(asked: Resources, pod: dict[str, Any] | None = None, **trainer: Any) -> dict[str, Any]:
    made = template(**trainer)
    made.manifest["spec"]["template"]["spec"] |= pod or {}
    return made.job(RUN, asked)


def container(job: dict[str, Any]) -> Any:
    return job["spec"]["template"]["spec"]["containers"][1]


def test_several_gpus_are_a_rank_each() -> None:
    job = launched(
        Resources(gpus=4), env=[{"name": "HOME", "value": "/tmp"}, {"name": "FOUNDRY_DEVICE", "value": "cpu"}]
    )
    assert container(job)["command"] == ["python", "-m", "services.trainer.launch"]
    assert container(job)["args"] == ["--dtype", "auto", "--run", RUN]
    assert container(job)["env"] == [
        {"name": "HOME", "value": "/tmp"},
        {"name": "FOUNDRY_DEVICE", "value": "cuda"},
        {"name": "PET_NPROC_PER_NODE", "value": "4"},
    ]
    assert "completionMode" not in job["spec"]
    by_template = launched(Resources(cpu="1"), resources={"limits": {"nvidia.com/gpu": 2}})
    assert {"name": "PET_NPROC_PER_NODE", "value": "2"} in container(by_template)["env"]
    for gpus, device in ((1, "cuda"), (0, "cpu")):
        alone = container(launched(Resources(gpus=gpus)))
        assert "command" not in alone
        assert alone["env"] == [{"name": "FOUNDRY_DEVICE", "value": device}]


def test_several_nodes_are_an_indexed_job() -> None:
    job = launched(Resources(gpus=8, nodes=3), {"subdomain": "foundry-ranks"}, command=["mine"])
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    assert container(job)["command"] == ["mine"]
    variables = {each["name"]: each for each in container(job)["env"]}
    index = variables.pop("PET_NODE_RANK")["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert {name: each["value"] for name, each in variables.items()} == {
        "FOUNDRY_DEVICE": "cuda",
        "PET_NPROC_PER_NODE": "8",
        "PET_NNODES": "3",
        "PET_MASTER_ADDR": "foundry-run-k3v7q2xa-0.foundry-ranks",
        "PET_MASTER_PORT": "29500",
    }


def test_an_indexed_job_is_valid() -> None:
    job = launched(Resources(gpus=8, nodes=3), {"subdomain": "foundry-ranks", "restartPolicy": "Never"})
    for each in job["spec"]["template"]["spec"]["containers"]:
        each["image"] = "trainer"
    for version in ("1.29", "1.35"):
        kubernetes_validate.validate(job, version, strict=True)


def test_nodes_without_a_name_for_the_first_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="subdomain"):
        launched(Resources(nodes=2))
    made = template(metadata={"generateName": "a" * 53})
    made.manifest["spec"]["template"]["spec"]["subdomain"] = "ranks"
    made.job(RUN, Resources(nodes=1))
    with pytest.raises(InvalidArgument, match="host name"):
        made.job(RUN, Resources(nodes=2))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "no key job.yaml"),
        ({"job.yaml": "a: [b"}, "not YAML"),
        ({"job.yaml": "text"}, "not a Job"),
        ({"job.yaml": "{apiVersion: batch/v1, kind: Job, spec: {}}"}, "not a Job"),
        (
            {"job.yaml": "{apiVersion: v1, kind: Pod, spec: {template: {spec: {containers: [{name: trainer}]}}}}"},
            "v1 Pod",
        ),
        (
            {"job.yaml": "{apiVersion: batch/v1, kind: Job, spec: {template: {spec: {containers: [{name: main}]}}}}"},
            "one container trainer",
        ),
    ],
)
def test_what_is_no_template_is_refused(data: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said) as raised:
        JobTemplate.parse("templates", "uid-1", data)
    assert "ConfigMap templates" in raised.value.message


def seen(*conditions: tuple[str, str], **status: Any) -> Job:
    stated = [{"type": kind, "status": state, "reason": "Why", "message": "how"} for kind, state in conditions]
    metadata = {"name": "foundry-run-a", "labels": {"foundry.dev/run": "run-a"}}
    return Job.of({"metadata": metadata, "status": status | {"conditions": stated}})


def test_a_job_has_ended_only_by_its_last_condition() -> None:
    for job in (seen(), seen(("FailureTarget", "True")), seen(("Suspended", "True")), seen(("Failed", "False"))):
        assert not job.finished
    assert seen(("FailureTarget", "True"), ("Failed", "True")).failure == "Why: how"
    assert seen(("SuccessCriteriaMet", "True"), ("Complete", "True")).complete


def test_a_job_says_what_its_run_waits_for() -> None:
    assert seen(active=1).waiting_for() == "job foundry-run-a: its pod is not ready"
    assert seen(active=1, failed=2).waiting_for() == "job foundry-run-a: 2 pods failed, the next is not ready"
