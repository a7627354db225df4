"""The study's harness on a tiny model: what it trains on, that it learns, resumes, and says how sure it is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any, cast

import numpy as np
import pytest

from benchmarks.study.cache import Cache
from benchmarks.study.document import FINAL, Question, StudyDocument, documents, every_document, read_document
from benchmarks.study.experiment import Bench, as_text
from benchmarks.study.grid import CURVES, GROUPS, Cell, Runner, jobs, left, mine
from benchmarks.study.intervals import Measurement, interval
from benchmarks.study.job import Course, Job
from benchmarks.study.report import page
from benchmarks.study.results import Study
from foundry.identity import content_digest
from foundry.model.lm import FrozenLM
from foundry.recipes import choose
from foundry.selfstudy.wording import normalised
from foundry.store import RunRequest, RunSpec
from services.trainer.data.conversation import Conversation
from services.trainer.data.curriculum import Curriculum
from services.trainer.update.schedule import learning_rate_scale
from tests.tiny import build_tiny_model

ROOT = Path(__file__).parents[2]
TEXT = (
    "The treaty was signed in the spring. The price of grain is nine pennies. "
    "The harbour is open again, says the president."
)
# The first is what an exercise would ask, in another spelling.
QUESTIONS = (
    Question([{"role": "user", "content": "CONTINUE the text, word for word: the treaty was SIGNED"}], ["spring"]),
    Question([{"role": "user", "content": "What is the price of grain?"}], ["nine", "9"]),
    Question([{"role": "user", "content": "Is the harbour open?"}], ["a"]),
)
DOCUMENT = StudyDocument("tiny", TEXT, QUESTIONS, (False, True, True))
TINY: dict[str, Any] = {
    "document": "tiny",
    "start": "first_tokens",
    "reference_tokens": 512,
    # A random model does not believe the document, and is not to be told better.
    "hard_label_weight": 0.0,
    "learning_rate": 0.1,
    "answer_tokens": 6000,
    "batch_size": 8,
    "max_new_tokens": 16,
    "num_questions": 8,
    "general_share": 0.1,
}
OFF, HYBRID = Job(mode="off", **TINY), Job(mode="hybrid", off_policy_share=0.5, **TINY)
ABOUT = {"device": "cpu", "dtype": "float32", "torch": "0", "model": "tiny", "workers": 1}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> FrozenLM:
    return FrozenLM.load(build_tiny_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def out(lm: FrozenLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the results of both jobs."""
    directory = tmp_path_factory.mktemp("study")
    runner = Runner(lm, directory, ABOUT, read=lambda name: DOCUMENT)
    for job in (OFF, HYBRID):
        runner.run(job)
    return directory


def result(out: Path, job: Job) -> dict[str, Any]:
    return json.loads((out / f"{job.id}.json").read_text())


@pytest.mark.parametrize("job", [OFF, HYBRID], ids=["off", "hybrid"])
def test_a_job_learns(out: Path, job: Job) -> None:
    found = result(out, job)
    assert Job.from_json(found["job"]) == job
    first, last = found["marks"][0], found["marks"][-1]
    assert (first["answer_tokens"], first["steps"]) == (0, 0)
    assert last["answer_tokens"] >= job.answer_tokens
    assert last["heldout_kl"] < 0.8 * first["heldout_kl"]
    for mark in found["marks"]:
        assert sum(mark["kl_millinats"]) / 1000 == pytest.approx(
            mark["heldout_kl"] * sum(found["answer_tokens"]), abs=0.01
        )
        assert len(mark["right"]) == len(QUESTIONS)
        assert sum(mark["tokens_by_family"].values()) == mark["answer_tokens"]


def test_what_is_trained_on_follows_the_mode(out: Path) -> None:
    off, hybrid = (result(out, job)["marks"][-1] for job in (OFF, HYBRID))
    assert set(off["tokens_by_family"]) == {"recite", "quote", "blank", "evidence", "question", "general"}
    assert {"recite", "quote", "blank", "evidence", "question", "own question"} <= set(hybrid["tokens_by_family"])
    own = sum(tokens for family, tokens in hybrid["tokens_by_family"].items() if family.startswith("own "))
    assert own == pytest.approx(0.5 * HYBRID.answer_tokens, abs=2 * HYBRID.batch_size * HYBRID.max_new_tokens)
    assert set(off["seconds"]) == {"start", "writing", "scoring", "update"}
    assert set(hybrid["seconds"]) == {"start", "writing", "scoring", "update", "rollout"}


@pytest.mark.parametrize(
    "values",
    [{"refit": False}, {"sequential": False}, {"restore_mass": False}, {"shown": "recite"}, {"shown": "questions"}],
)
def test_other_starts(lm: FrozenLM, out: Path, values: dict[str, Any]) -> None:
    bench = Bench(lm, DOCUMENT, Cache(out / "cache"))
    usual = replace(OFF, start="compact", answer_tokens=0)
    (mark,) = bench.run(replace(usual, **values))["marks"]
    assert mark["heldout_kl"] != bench.run(usual)["marks"][0]["heldout_kl"]
    assert mark["tokens_by_family"] == {}


def test_nothing_held_out_is_trained_on(lm: FrozenLM, out: Path) -> None:
    writer = Bench(lm, DOCUMENT, Cache(out / "cache")).writer
    data = writer.data(HYBRID, 10.0)
    trained = {normalised(each.prompt) for each in (*data.curriculum.written, *data.curriculum.asked)}
    assert not trained & DOCUMENT.held
    # Without that question, its exercise would be among them.
    free = replace(DOCUMENT, questions=QUESTIONS[1:], answerable=(True, True))
    exercises = Bench(lm, free, Cache(out / "cache")).writer.family("recite", HYBRID).conversations
    assert normalised(QUESTIONS[0].text) in {normalised(each.prompt) for each in exercises}


def test_a_result_that_is_there_is_not_made_again(lm: FrozenLM, out: Path) -> None:
    other = replace(OFF, seed=1)
    assert left([OFF, other, HYBRID], out) == [other]
    before = (out / f"{OFF.id}.json").stat()

    def read(name: str) -> StudyDocument:
        raise AssertionError(f"{name} is not needed")

    Runner(lm, out, ABOUT, read=read).run(OFF)
    assert (out / f"{OFF.id}.json").stat() == before


def test_what_jobs_share_is_made_once(tmp_path: Path) -> None:
    cache, calls = Cache(tmp_path), []

    def make() -> list[int]:
        calls.append(1)
        return [1, 2]

    first, second = (cache.get("thing", ["key"], make) for _ in range(2))
    assert first == second
    assert first.content == [1, 2]
    assert len(calls) == 1


def test_jobs_that_start_alike_share_their_start(lm: FrozenLM, out: Path) -> None:
    bench = Bench(lm, DOCUMENT, Cache(out / "cache"))
    started = bench.started(OFF)
    assert bench.started(replace(HYBRID, learning_rate=1.0, families=("recite",))) is started
    assert bench.started(replace(OFF, seed=1)) is not started
    assert result(out, OFF)["marks"][0]["right"] == as_text(started.measured.right)


def test_a_process_keeps_to_its_document() -> None:
    waiting: list[Queue[Job | None]] = [Queue(), Queue()]
    for queue, each in zip(waiting, (OFF, HYBRID), strict=True):
        for job in (each, replace(each, seed=1), None, None):
            queue.put(job)
    assert list(mine(waiting, 3)) == [HYBRID, replace(HYBRID, seed=1), OFF, replace(OFF, seed=1)]
    # Another one finds the end of both.
    assert list(mine(waiting, 0)) == []


def test_the_last_document_stands_apart(out: Path) -> None:
    study, cell = Study.gather(out), Cell("off", replace(OFF, document=""))
    row = result(out, OFF)
    rows = [{**row, "job": {**row["job"], "document": name}} for name in (OFF.document, FINAL)]
    both = Study.of_rows(study.about, dict.fromkeys((OFF.document, FINAL), study.documents[OFF.document]), rows)
    assert list(both.of(cell)) == [OFF.document]
    assert list(both.of(cell, final=True)) == [FINAL]


def test_the_grid_names_documents_that_are_there() -> None:
    everything = jobs([cell for cells in GROUPS.values() for cell in cells])
    assert len({job.id for job in everything}) == len(everything)
    assert {job.document for job in everything} == set(documents()) == set(every_document()) - {FINAL}
    for name in every_document():
        document = read_document(name)
        assert len(document.held) == len(document.questions) == len(document.answerable)


# The product's own numbers


def spec(job: Job, **values: Any) -> RunSpec:
    names = ("batch_size", "general_share", "seed", "schedule", "warmup_steps")
    return RunSpec(name="study", document=content_digest(b""), **{name: getattr(job, name) for name in names}, **values)


def test_a_course_is_to_the_product_what_a_run_is() -> None:
    job = Job(document="x", answer_tokens=40 * 16 * 30, batch_size=16, seed=3)
    course = Course.of(job, 30.0)
    run = spec(job, num_steps=40)
    assert course.num_steps == run.num_steps
    rows = [Conversation(family, "", f"{family} {place}", 0, 0, [place], "") for family in "ab" for place in range(50)]
    curriculum = Curriculum("", rows[:50], rows, (), rows[:20])
    like_run = cast("RunSpec", course)
    for step in range(run.num_steps):
        assert curriculum.written_batch(step, like_run) == curriculum.written_batch(step, run)
        assert curriculum.asked_batch(step, like_run) == curriculum.asked_batch(step, run)
        assert learning_rate_scale(like_run, step) == learning_rate_scale(run, step)


def test_defaults_are_the_recipe() -> None:
    run = choose(RunRequest(name="study", document=content_digest(b""), recipe="standard"), 2400)
    job = Job(document="x")
    for name in (
        *("mode", "off_policy_share", "families", "max_new_tokens", "batch_size", "general_share", "objective"),
        *("hard_label_weight", "learning_rate", "schedule", "warmup_steps", "max_grad_norm"),
        *("reference_tokens", "matching_steps"),
    ):
        assert getattr(job, name) == getattr(run, name), name
    assert job.num_tokens(2400) == run.num_tokens
    for cell in CURVES:
        request = RunRequest(name="study", document=content_digest(b""), compression=cell.job.compression)
        assert cell.job.learning_rate == choose(request, 2400).learning_rate
    assert run.prompts.kind == "selfstudy"
    assert job.num_questions == run.prompts.num_prompts


BLOCKED = """
import importlib, sys
blocked, *modules = sys.argv[1:]
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked.split(","):
            raise ImportError(f"{name} is not on a bare machine")
sys.meta_path.insert(0, Blocker())
for module in modules:
    importlib.import_module(module)
"""
SERVICES = ("grpc", "redis", "fastapi", "obstore", "pydantic_settings")


@pytest.mark.parametrize(
    ("blocked", "modules"),
    [
        ((*SERVICES, "prometheus_client"), ("study.grid", "rollout", "update")),
        # It brings contexts back through the teacher's own tiers, which count.
        (SERVICES, ("teacher",)),
    ],
)
def test_a_bare_machine_is_enough(blocked: Sequence[str], modules: Sequence[str]) -> None:
    command = [sys.executable, "-c", BLOCKED, ",".join(blocked), *(f"benchmarks.{name}" for name in modules)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# How sure the figures are


def measurement(totals: Any, weights: Any) -> Measurement:
    return Measurement(np.array(totals, dtype=np.float64), np.array(weights, dtype=np.float64))


def test_an_interval_is_about_the_mean() -> None:
    draw = np.random.default_rng(1)
    right = (draw.random((3, 400)) < 0.3).astype(np.float64)
    found = interval([measurement(right, np.ones(400))])
    assert found.value == pytest.approx(right.mean())
    # Seeds that know nothing of each other, and questions that don't matter: half a width of 2 / sqrt(1200) at least.
    spread = 1.96 * np.sqrt(0.3 * 0.7 / 1200)
    assert found.low < found.value - 0.7 * spread
    assert found.high > found.value + 0.7 * spread
    assert found.high - found.low < 6 * spread


def test_weights_count() -> None:
    found = interval([measurement([[1.0, 3.0]], [1.0, 1.0]), measurement([[5.0, 5.0]], [1.0, 4.0])])
    assert found.value == pytest.approx((2.0 + 2.0) / 2)


def test_a_difference_is_paired() -> None:
    draw = np.random.default_rng(2)
    totals = draw.random((3, 50))
    one, other = measurement(totals, np.ones(50)), measurement(totals + 0.1, np.ones(50))
    found = interval([other], [one])
    assert (found.low, found.value, found.high) == pytest.approx((0.1, 0.1, 0.1))


# The page


def test_the_page_renders_from_results(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [Cell(f"compact, {job.mode}", replace(job, document="", seed=0)) for job in (OFF, HYBRID)]
    monkeypatch.setattr("benchmarks.study.report.STARTS_AND_MODES", cells)
    Study.gather(out).write(tmp_path / "study.json")
    study = Study.read(tmp_path / "study.json")
    assert set(study.results) >= {OFF, HYBRID}
    text = page(study, tmp_path / "results")
    last = result(out, OFF)["marks"][-1]
    assert f"| compact, off | {last['heldout_kl']:.3f} [" in text
    assert "hybrid less off" in text
    figures = {name for name in ("starts", "modes", "modes-seconds") if f"(results/{name}.svg)" in text}
    assert figures == {"starts", "modes", "modes-seconds"}
    for name in figures:
        assert "<svg" in (tmp_path / "results" / f"{name}.svg").read_text()
    # Again the same bytes.
    before = (tmp_path / "results" / "modes.svg").read_bytes()
    assert page(study, tmp_path / "results") == text
    assert (tmp_path / "results" / "modes.svg").read_bytes() == before
