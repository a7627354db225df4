"""A Kubernetes Job for each run: what gateways make, delete and write down, against a real store."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from foundry.errors import InvalidArgument
from foundry.store import CartridgeStore, Resources, RunState, RunStore
from services.gateway.kubernetes.jobs import Jobs
from services.gateway.settings import JobSettings
from tests.kube_api import KubeApi, open_kube_api
from tests.process import Process
from tests.services import get, metric, open_stack, wait_ready, wait_until
from tests.store_data import run_spec

TEMPLATE = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "spec": {"template": {"spec": {"containers": [{"name": "trainer", "image": "trainer:1"}]}}},
}
Gateway = Callable[..., Jobs]


@pytest.fixture
def kube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeApi]:
    with open_kube_api(tmp_path) as api:
        api.put_config_map("template", {"job.yaml": json.dumps(TEMPLATE)})
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
        yield api


@pytest.fixture
async def gateway(kube: KubeApi, store: CartridgeStore) -> AsyncIterator[Gateway]:
    """Makes what one gateway has; they share the store."""
    opened = []

    def open_jobs(**settings: Any) -> Jobs:
        opened.append(Jobs(JobSettings(template="template", **settings), store.runs))
        return opened[-1]

    yield open_jobs
    for jobs in opened:
        await jobs.close()


def name(run_id: str) -> str:
    return f"foundry-{run_id}"


async def lose_worker(runs: RunStore, run_id: str) -> None:
    """A worker takes the run and is never heard of again."""
    assert await runs.claim_run(run_id, "worker-0", 0.001) is not None
    async with asyncio.timeout(10):
        while run_id not in (await runs.active()).waiting:
            pass


async def test_each_run_that_waits_gets_one_job(kube: KubeApi, gateway: Gateway, runs: RunStore) -> None:
    first = await runs.create(run_spec(resources=Resources(cpu="2", gpus=1)))
    second = await runs.create(run_spec("other"))
    jobs = gateway()
    assert jobs.name_of(first) is None
    assert await jobs.reconcile()
    assert await jobs.reconcile()
    assert set(kube.jobs) == {name(first), name(second)}
    assert kube.answers.count(("create", "jobs", 201)) == 2
    assert jobs.name_of(first) == name(first)
    job = kube.jobs[name(first)]
    assert job["metadata"]["ownerReferences"][0]["uid"] == kube.config_maps["template"]["metadata"]["uid"]
    (trainer,) = job["spec"]["template"]["spec"]["containers"]
    assert trainer["args"] == ["--run", first]
    assert trainer["resources"]["limits"] == {"cpu": "2", "nvidia.com/gpu": "1"}


async def test_two_gateways_racing_for_one_run_make_one_job(kube: KubeApi, gateway: Gateway, runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    kube.meeting = threading.Barrier(2)
    assert all(await asyncio.gather(gateway().reconcile(), gateway().reconcile()))
    assert list(kube.jobs) == [name(run_id)]
    assert sorted(status for verb, _, status in kube.answers if verb == "create") == [201, 409]


async def test_a_job_that_somebody_deleted_is_made_again(kube: KubeApi, gateway: Gateway, runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    jobs = gateway()
    await jobs.reconcile()
    claimed = await runs.claim_run(run_id, "worker-0", 60)
    assert claimed is not None
    kube.jobs.clear()
    await jobs.reconcile()
    assert not kube.jobs, "its worker lives"
    await runs.requeue(run_id, claimed.attempt)
    await jobs.reconcile()
    assert list(kube.jobs) == [name(run_id)]


async def test_a_run_whose_worker_was_lost_with_its_job_gets_another(
    kube: KubeApi, gateway: Gateway, runs: RunStore
) -> None:
    run_id = await runs.create(run_spec())
    await lose_worker(runs, run_id)
    await gateway().reconcile()
    assert list(kube.jobs) == [name(run_id)]


async def test_a_paused_run_gets_its_job_when_it_is_resumed(kube: KubeApi, gateway: Gateway, runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    await runs.request_pause(run_id)
    jobs = gateway()
    await jobs.reconcile()
    assert not kube.jobs
    await runs.request_resume(run_id)
    await jobs.reconcile()
    assert list(kube.jobs) == [name(run_id)]


async def test_a_run_says_that_its_job_is_not_ready(kube: KubeApi, gateway: Gateway, runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    jobs = gateway()
    await jobs.reconcile()
    await jobs.reconcile()
    record = await runs.get(run_id)
    assert (record.state, record.waiting_for) == (RunState.QUEUED, f"job {name(run_id)}: its pod is not ready")
    kube.jobs[name(run_id)]["status"] = {"failed": 1}
    await jobs.reconcile()
    assert "1 pod failed" in (await runs.get(run_id)).waiting_for
    await runs.claim_run(run_id, "worker-0", 60)
    await jobs.reconcile()
    record = await runs.get(run_id)
    assert (record.state, record.waiting_for) == (RunState.RUNNING, "")


async def test_the_job_of_a_cancelled_run_goes(kube: KubeApi, gateway: Gateway, runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    jobs = gateway()
    await jobs.reconcile()
    await runs.request_cancel(run_id)
    assert await jobs.reconcile()
    assert not kube.jobs
    assert kube.propagation == ["Background"]


async def test_a_worker_has_its_time_to_end_a_cancelled_run(kube: KubeApi, gateway: Gateway, runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    patient, strict = gateway(), gateway(cancel_grace_seconds=0)
    await patient.reconcile()
    claimed = await runs.claim_run(run_id, "worker-0", 60)
    assert claimed is not None
    await runs.request_cancel(run_id)
    await patient.reconcile()
    assert list(kube.jobs) == [name(run_id)]
    await strict.reconcile()
    assert not kube.jobs
    # Its pod is told to stop and gives the run back.
    await runs.requeue(run_id, claimed.attempt)
    assert (await runs.get(run_id)).state is RunState.CANCELLED


async def test_a_cancelled_run_whose_worker_was_lost_ends(kube: KubeApi, gateway: Gateway, runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    jobs = gateway()
    await jobs.reconcile()
    assert await runs.claim_run(run_id, "worker-0", 0.5) is not None
    await runs.request_cancel(run_id)
    assert (await runs.get(run_id)).state is RunState.RUNNING
    async with asyncio.timeout(10):
        while run_id not in (await runs.active()).waiting:
            pass
    await jobs.reconcile()
    assert (await runs.get(run_id)).state is RunState.CANCELLED
    await jobs.reconcile()
    assert not kube.jobs


async def test_a_job_that_failed_for_good_fails_its_run(kube: KubeApi, gateway: Gateway, runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    first, second = gateway(), gateway()
    await first.reconcile()
    kube.end_job(name(run_id), "Failed", "BackoffLimitExceeded", "it has been tried often enough")
    assert all(await asyncio.gather(first.reconcile(), second.reconcile()))
    record = await runs.get(run_id)
    assert record.state is RunState.FAILED
    assert record.error is not None
    assert name(run_id) in record.error
    assert "BackoffLimitExceeded: it has been tried often enough" in record.error
    assert name(run_id) in kube.jobs, "its logs say more"
    events = [event async for _, event in runs.events(run_id)]
    assert [event["type"] for event in events].count("finished") == 1


async def test_a_run_with_a_live_worker_is_not_failed_by_its_job(
    kube: KubeApi, gateway: Gateway, runs: RunStore
) -> None:
    run_id = await runs.create(run_spec())
    jobs = gateway()
    await jobs.reconcile()
    claimed = await runs.claim_run(run_id, "worker-0", 60)
    assert claimed is not None
    kube.end_job(name(run_id), "Failed", "DeadlineExceeded", "too long")
    await jobs.reconcile()
    await runs.heartbeat(run_id, claimed.attempt, 60)
    await runs.requeue(run_id, claimed.attempt)
    await jobs.reconcile()
    assert (await runs.get(run_id)).state is RunState.FAILED


async def test_a_job_that_ended_before_its_run_is_replaced(kube: KubeApi, gateway: Gateway, runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    jobs = gateway()
    await jobs.reconcile()
    before = kube.jobs[name(run_id)]["metadata"]["uid"]
    kube.end_job(name(run_id), "Complete")
    await jobs.reconcile()
    await jobs.reconcile()
    assert kube.jobs[name(run_id)]["metadata"]["uid"] != before


async def test_a_paused_run_has_no_pod_and_gets_one_when_it_is_resumed(
    kube: KubeApi, gateway: Gateway, runs: RunStore
) -> None:
    run_id = await runs.create(run_spec())
    jobs = gateway()
    await jobs.reconcile()
    before = kube.jobs[name(run_id)]["metadata"]["uid"]
    claimed = await runs.claim_run(run_id, "worker-0", 60)
    assert claimed is not None
    await runs.request_pause(run_id)
    # Its pod gives it back and ends well.
    await runs.requeue(run_id, claimed.attempt)
    kube.end_job(name(run_id), "Complete")
    for _ in range(2):
        await jobs.reconcile()
    assert kube.jobs[name(run_id)]["metadata"]["uid"] == before
    await runs.request_resume(run_id)
    for _ in range(2):
        await jobs.reconcile()
    assert kube.jobs[name(run_id)]["metadata"]["uid"] != before


async def test_jobs_of_runs_that_ended_by_themselves_stay(kube: KubeApi, gateway: Gateway, runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    patient, strict = gateway(), gateway(cancel_grace_seconds=0)
    await patient.reconcile()
    claimed = await runs.claim_run(run_id, "worker-0", 60)
    assert claimed is not None
    await runs.finish(run_id, claimed.attempt, RunState.SUCCEEDED)
    await patient.reconcile()
    kube.end_job(name(run_id), "Complete")
    await strict.reconcile()
    assert list(kube.jobs) == [name(run_id)]
    # One that never ends, because its pod can't start, does not stay.
    kube.jobs[name(run_id)]["status"] = {"active": 1}
    await strict.reconcile()
    assert not kube.jobs


async def test_jobs_of_unknown_runs_are_left_alone(kube: KubeApi, gateway: Gateway, runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    jobs = gateway()
    await jobs.reconcile()
    other = kube.jobs[name(run_id)]
    other["metadata"]["labels"]["foundry.dev/run"] = "run-ofanother"
    other["status"] = {"conditions": [{"type": "Failed", "status": "True"}]}
    kube.jobs = {"theirs": other}
    assert await jobs.reconcile()
    assert kube.jobs == {"theirs": other, name(run_id): kube.jobs[name(run_id)]}


@pytest.mark.parametrize(
    ("verb", "resource", "status"),
    [("create", "jobs", 403), ("get", "configmaps", 403), ("create", "jobs", 422), ("create", "jobs", 500)],
)
async def test_what_the_api_refuses_is_said_and_tried_again(
    kube: KubeApi, gateway: Gateway, runs: RunStore, verb: str, resource: str, status: int
) -> None:
    run_id = await runs.create(run_spec())
    jobs = gateway()
    kube.refusals[verb, resource] = (status, "as a test wants it")
    assert not await jobs.reconcile()
    waiting_for = (await runs.get(run_id)).waiting_for
    assert f"{verb} {resource}" in waiting_for
    assert "as a test wants it" in waiting_for
    kube.refusals.clear()
    assert await jobs.reconcile()
    assert list(kube.jobs) == [name(run_id)]


async def test_one_run_that_is_refused_does_not_hold_up_others(kube: KubeApi, gateway: Gateway, runs: RunStore) -> None:
    cancelled, queued = await runs.create(run_spec()), await runs.create(run_spec("other"))
    jobs = gateway()
    await jobs.reconcile()
    del kube.jobs[name(queued)]
    await runs.request_cancel(cancelled)
    kube.refusals["delete", "jobs"] = (403, "no")
    assert not await jobs.reconcile()
    assert set(kube.jobs) == {name(cancelled), name(queued)}


async def test_an_api_that_is_away_is_waited_for(kube: KubeApi, gateway: Gateway, runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    jobs = gateway(api_timeout_seconds=1)
    kube.stop()
    assert not await jobs.reconcile()
    kube.start()
    assert await jobs.reconcile()
    assert list(kube.jobs) == [name(run_id)]


async def test_a_faulty_template_is_said(kube: KubeApi, gateway: Gateway, runs: RunStore) -> None:
    run_id = await runs.create(run_spec())
    kube.put_config_map("template", {"job.yaml": "kind: Pod"})
    assert not await gateway().reconcile()
    assert "ConfigMap template" in (await runs.get(run_id)).waiting_for


async def test_a_new_run_is_not_waited_for(kube: KubeApi, gateway: Gateway, runs: RunStore) -> None:
    jobs = gateway(poll_seconds=600)
    jobs.start()
    await asyncio.to_thread(kube.wait_for, "list", "jobs", 200)
    run_id = await runs.create(run_spec())
    jobs.wake()
    await asyncio.to_thread(kube.wait_for, "create", "jobs", 201)
    assert list(kube.jobs) == [name(run_id)]


@pytest.mark.parametrize(
    ("field", "resources"),
    [
        ("resources.cpu", Resources(cpu="64001m")),
        ("resources.memory", Resources(memory="257Gi")),
        ("resources.gpus", Resources(gpus=9)),
        ("resources.gpus", Resources(gpus=3, nodes=3)),
        ("resources.nodes", Resources(nodes=5)),
    ],
)
async def test_more_than_a_run_may_ask_for_is_refused(gateway: Gateway, field: str, resources: Resources) -> None:
    jobs = gateway(max_nodes=4)
    jobs.check(Resources(cpu="64", memory="256Gi", gpus=8))
    jobs.check(Resources(cpu="16", memory="64Gi", gpus=2, nodes=4))
    with pytest.raises(InvalidArgument) as raised:
        jobs.check(resources)
    assert raised.value.field == field


def test_the_rest_api_makes_names_and_deletes_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_kube_api(tmp_path) as kube, open_stack(tmp_path) as stack:
        monkeypatch.setenv("KUBECONFIG", str(kube.kubeconfig))
        kube.put_config_map("template", {"job.yaml": json.dumps(TEMPLATE)})
        process = stack.gateway([], "--rollout-addresses", "127.0.0.1:9", "--jobs.template", "template")
        wait_ready(process, "/readyz?exclude=rollouts")
        spec = {"name": "a", "text": "A text.", "num_tokens": 4, "num_steps": 1, "resources": {"memory": "1Gi"}}
        spec["prompts"] = {"kind": "selfstudy", "num_prompts": 1}
        run = post(process, "/v1/runs", json=spec).json()
        job = name(run["id"])
        wait_until(lambda: get(process, f"/v1/runs/{run['id']}").json()["job"] == job, process)
        (trainer,) = kube.jobs[job]["spec"]["template"]["spec"]["containers"]
        assert trainer["resources"]["limits"] == {"memory": "1Gi"}
        assert metric(process.metrics, "foundry_gateway_jobs_total", outcome="created") == 1
        assert post(process, f"/v1/runs/{run['id']}/cancel").json()["state"] == "cancelled"
        wait_until(lambda: not kube.jobs, process)
        refused = post(process, "/v1/runs", json=spec | {"resources": {"gpus": 9}})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "resources.gpus")
        kube.refusals["list", "jobs"] = (403, "not for you")
        post(process, "/v1/runs", json=spec)
        wait_until(lambda: metric(process.metrics, "foundry_gateway_jobs_total", outcome="refused") > 0, process)
        assert get(process, "/readyz?exclude=rollouts").status_code == 200
        assert "list jobs in namespace training" in process.log.read_text()


def post(process: Process, path: str, **arguments: Any) -> httpx.Response:
    return httpx.post(f"http://{process.address}{path}", trust_env=False, timeout=60, **arguments)
