"""Rollout, scoring and update of different steps at once: older answers are proved, come again, and traces show it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from foundry.store import CartridgeStore, RunState
from tests.collector import Collector, Span, open_collector
from tests.e2e.training import STEPS, create_run, numbers, spawn_trainer, start_servers
from tests.services import Process, Stack, metric, open_stack, wait_serving

pytestmark = pytest.mark.timeout(180)


@dataclass
class Finished:
    run_id: str
    events: list[dict[str, Any]]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == "step"]


@dataclass
class Site:
    stack: Stack
    collector: Collector
    teacher: Process
    trainer: Process

    def train(self, name: str, **changes: Any) -> Finished:
        async def run(store: CartridgeStore) -> Finished:
            run_id = await create_run(store, name, **changes)
            return Finished(run_id, [event async for _, event in store.runs.events(run_id)])

        return self.stack.with_store(run)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_collector() as (collector, endpoint), open_stack(tmp_path_factory.mktemp("overlap")) as stack:
        rollout, teacher = start_servers(stack)
        trainer = spawn_trainer(stack, rollout, teacher, "--otlp-endpoint", endpoint)
        wait_serving(trainer)
        yield Site(stack, collector, teacher, trainer)


@pytest.fixture(scope="module")
def ahead(site: Site) -> Finished:
    """One step ahead, with measurements and checkpoints in between."""
    return site.train("ahead", max_staleness=1, heldout_every=2)


@pytest.mark.parametrize("max_staleness", [1, 3])
def test_the_step_s_number_says_which_version_answers_it(site: Site, max_staleness: int) -> None:
    name = f"numbered-{max_staleness}"
    finished = site.train(name, max_staleness=max_staleness)
    assert finished.events[-1]["state"] == RunState.SUCCEEDED, finished.events[-1]
    steps = finished.steps
    assert [event["staleness"] for event in steps] == [min(step, max_staleness) for step in range(STEPS)]
    made = {0: steps[0]["sampled_digest"]} | {event["step"]: event["digest"] for event in steps}
    assert len(set(made.values())) == STEPS + 1
    for event in steps:
        assert event["sampled_digest"] == made[max(0, event["step"] - 1 - max_staleness)]
        # Against another version they would lie 9e-5 or more apart.
        assert event["policy_mismatch_kl"] < 1e-8
    assert steps[0]["importance_weight"] is None
    assert all(0 < event["importance_weight"] <= 2 for event in steps[1:])
    assert metric(site.trainer.metrics, "foundry_trainer_staleness_versions") == max_staleness
    assert metric(site.trainer.metrics, "foundry_trainer_importance_weight") == steps[-1]["importance_weight"]
    versions = [event["version"] for event in steps]
    assert versions == sorted(versions)
    assert site.stack.with_store(lambda store: store.resolve(name)).digest == steps[-1]["digest"]


def test_the_same_run_again_has_the_same_numbers(site: Site, ahead: Finished) -> None:
    # Whatever is measured and kept between its steps.
    again = site.train("again", max_staleness=1, checkpoint_every=1)
    assert list(map(numbers, again.steps)) == list(map(numbers, ahead.steps))


def test_a_trace_shows_several_steps_at_once(site: Site, ahead: Finished) -> None:
    def roots(spans: list[Span]) -> dict[int, Span]:
        steps = [span for span in spans if span.name == "step" and span.attributes["foundry.run"] == ahead.run_id]
        return {span.attributes["foundry.step"]: span for span in steps}

    spans = site.collector.wait(lambda spans: len(roots(spans)) == STEPS)
    steps = roots(spans)

    def stage(step: int, name: str) -> Span:
        (found,) = [span for span in spans if span.trace_id == steps[step].trace_id and span.name == name]
        return found

    assert len({root.trace_id for root in steps.values()}) == STEPS
    # The first version answers both: the second step need not wait for what the first one makes.
    assert stage(2, "rollout").began_ns < stage(1, "update").began_ns
    for step in range(1, STEPS):
        assert steps[step + 1].began_ns < steps[step].ended_ns
    for step in range(1, STEPS - 1):
        # Nothing is asked of a version before it is out.
        assert stage(step, "publish").ended_ns <= stage(step + 2, "rollout").began_ns
        assert steps[step + 2].attributes["foundry.digest"] == ahead.steps[step - 1]["digest"]


def test_a_run_that_is_cancelled_leaves_nothing_in_flight(site: Site) -> None:
    async def run(store: CartridgeStore) -> list[dict[str, Any]]:
        run_id = await create_run(store, "cancelled", max_staleness=3, num_steps=10**4)
        events = []
        async for _, event in store.runs.events(run_id):
            events.append(event)
            if event["type"] == "step" and event["step"] == 3:
                await store.runs.request_cancel(run_id)
        return events

    events = site.stack.with_store(run)
    assert events[-1]["state"] == RunState.CANCELLED
    last = [event for event in events if event["type"] == "step"][-1]
    # What was trained is out, durable and the newest; what was answered beyond it is nobody's.
    assert site.stack.with_store(lambda store: store.resolve("cancelled")).digest == last["digest"]
    assert last["version"] in site.stack.with_store(lambda store: store.durable_versions("cancelled"))
    versions = site.stack.with_store(lambda store: store.versions("cancelled"))
    assert versions[-1].step == last["step"]


def test_a_server_that_decodes_with_another_version_than_an_older_step_claims_is_refused(site: Site) -> None:
    liar = site.stack.rollout(module="tests.e2e.stale_rollout")
    wait_serving(liar)
    trainer = spawn_trainer(site.stack, liar, site.teacher)
    site.trainer.stop()
    wait_serving(trainer)
    finished = site.train("deceived", max_staleness=1)
    trainer.stop()
    # It answers for the first version for ever, which two steps claim.
    assert [event["step"] for event in finished.steps] == [1, 2]
    end = finished.events[-1]
    assert end["state"] == RunState.FAILED
    claimed = f"{finished.steps[0]['version']}, {finished.steps[0]['digest']}"
    assert end["error"].startswith("POLICY_MISMATCH: nothing was trained")
    assert f"Rollout {liar.address} claimed version {claimed}" in end["error"]
    manifests = site.stack.with_store(lambda store: store.versions("deceived"))
    assert [manifest.step for manifest in manifests] == [0, 1, 2]
