"""The Job of a run: from the template, and back from what the API says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from foundry.errors import InvalidArgument
from foundry.store import Resources
from services.gateway.job import Job, JobTemplate

RUN = "run-k3v7q2xa"


def template(*, metadata: dict[str, Any] | None = None, **trainer: Any) -> JobTemplate:
    containers = [{"name": "sidecar"}, {"name": "trainer", "args": ["--device", "cuda"], **trainer}]
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
    assert trainer == {"name": "trainer", "args": ["--device", "cuda", "--run", RUN]}
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
