"""One job of the study: a cartridge is started, trained and measured, all in this process, by the product's own code.

Exercises, starts, curriculum, distillation, the proofs of who wrote an answer, learning rates, scoring and decoding are
the product's; only the services around them, their store and their wire are left out.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from benchmarks.study.cache import Cache
from benchmarks.study.decoding import Decoder
from benchmarks.study.document import StudyDocument
from benchmarks.study.job import Job
from benchmarks.study.measure import Measured, Measures
from benchmarks.study.start import start_kv
from benchmarks.study.teacher import DOCUMENT, MICRO_BATCH_TOKENS, Teacher
from benchmarks.study.written import Data, Writer
from foundry.model.cartridge import TrainableCartridge
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective
from foundry.rpc.answers import Prompt
from foundry.seeds import derive_seed
from foundry.selfstudy.wording import normalised
from services.trainer.data.conversation import Conversation
from services.trainer.sample import Sample
from services.trainer.signal_cache import SignalCache
from services.trainer.update.authorship import prove_authors
from services.trainer.update.gradient import Signal
from services.trainer.update.schedule import learning_rate_scale
from services.trainer.update.step import TrainingStep

if TYPE_CHECKING:
    from foundry.store import RunSpec

# Of answer tokens: after the first step that reaches one, a measurement is taken.
MARKS = (0, 8_000, 16_000, 33_000, 66_000, 100_000, 166_000, 250_000)
# Enough for any batch, and for all questions of a document at once.
_MAX_SEQUENCES, _MAX_SEQUENCE_TOKENS = 128, 256
# Teacher's signals that are kept in memory: all of a document's.
_SIGNAL_BYTES = 2**33
_MISMATCH_THRESHOLD = 0.05


class Bench:
    """A document on a model: what all its jobs in one process share."""

    def __init__(self, lm: FrozenLM, document: StudyDocument, cache: Cache) -> None:
        self.decoder = Decoder(lm, max_sequences=_MAX_SEQUENCES, max_sequence_tokens=_MAX_SEQUENCE_TOKENS)
        self.teacher = Teacher(lm, document, self.decoder)
        self.measures = Measures(self.teacher, self.decoder, cache)
        self.writer = Writer(self.teacher, cache)
        # Starts, by what makes them: their KV, the seconds they took and how good they are.
        self._starts: dict[Job, Started] = {}

    def started(self, job: Job) -> Started:
        """Jobs that start alike share what is measured there."""
        key = job.start_alone
        if key not in self._starts:
            self._starts[key] = self._start(job)
        return self._starts[key]

    def _start(self, job: Job) -> Started:
        questions = self.writer.family("question", job) if job.shown == "questions" else None
        began = time.perf_counter()
        kv_L2GPD = start_kv(self.teacher, job, questions.conversations if questions else ())
        # Off the device until it is wanted again, which also waits for it.
        kv_L2GPD = kv_L2GPD.cpu()
        seconds = time.perf_counter() - began
        if questions:
            seconds += sum(questions.seconds) + sum(self.writer.questions(job).seconds)
        lm = self.teacher.lm
        return Started(kv_L2GPD, seconds, self.measures.take(TrainableCartridge(lm, kv_L2GPD.to(lm.device))))

    def run(self, job: Job, marks: Sequence[int] = MARKS) -> dict[str, Any]:
        """What `benchmarks.study.report` reads."""
        experiment = Experiment(self, job)
        experiment.run(marks)
        document = self.teacher.document
        return {
            "job": asdict(job),
            "context_tokens": len(self.teacher.context_ids),
            "num_tokens": job.num_tokens(len(self.teacher.context_ids)),
            # Of each question.
            "answer_tokens": self.measures.question_tokens,
            "answerable": as_text(document.answerable),
            "teacher_right": as_text(self.measures.teacher_right),
            "marks": [asdict(mark) for mark in experiment.marks],
        }


@dataclass(frozen=True, slots=True)
class Started:
    """What a cartridge is before the first step; the KV is on the host."""

    kv_L2GPD: Tensor
    seconds: float
    measured: Measured


@dataclass(frozen=True, slots=True)
class Mark:
    """A cartridge as it was after so many answer tokens."""

    answer_tokens: int
    steps: int
    # Of all questions' answers, nats a token.
    heldout_kl: float
    general_kl: float
    # Mean of the steps since the last mark, nats a token.
    training_loss: float | None
    # A question each: thousandths of a nat, summed over the answer's tokens, and 1 where it was answered right.
    kl_millinats: Sequence[int]
    right: str
    # By what they were spent on, evaluation excluded: `start`, `writing` of answers, `scoring`, `update`, `rollout`.
    seconds: dict[str, float]
    tokens_by_family: dict[str, int]


class Experiment:
    def __init__(self, bench: Bench, job: Job) -> None:
        self._bench, self._job, self._lm = bench, job, bench.teacher.lm
        self.marks: list[Mark] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._families: Counter[str] = Counter()
        self._steps = self._tokens = 0
        self._losses: list[float] = []
        self._signals = SignalCache(_SIGNAL_BYTES, 0)
        # Families and prompts whose writing is in the seconds already.
        self._paid: set[tuple[str, str]] = set()
        self._words = {DOCUMENT: normalised(bench.teacher.document.text)}

    def run(self, marks: Sequence[int]) -> None:
        job, bench = self._job, self._bench
        started = bench.started(job)
        self._seconds["start"] = started.seconds
        self._mark(started.measured)
        if not job.answer_tokens:
            return
        cartridge = TrainableCartridge(self._lm, started.kv_L2GPD.to(self._lm.device))
        step = TrainingStep(
            self._lm,
            cartridge,
            Objective(job.objective, hard_label_weight=job.hard_label_weight),
            learning_rate=job.learning_rate,
            micro_batch_tokens=MICRO_BATCH_TOKENS,
            policy_mismatch_threshold=_MISMATCH_THRESHOLD,
            max_grad_norm=job.max_grad_norm,
        )
        self._train(step, bench.writer.data(job, bench.measures.mean_answer_tokens), marks)
        self._signals.close()

    def _train(self, step: TrainingStep, data: Data, marks: Sequence[int]) -> None:
        ahead = [mark for mark in marks if 0 < mark < self._job.answer_tokens] + [self._job.answer_tokens]
        # The store's package wants clients that a bare machine lacks; a course has all that is read of a run here.
        spec = cast("RunSpec", data.course)
        while ahead:
            scale = learning_rate_scale(spec, data.course.step_at(self._tokens))
            if on_policy := self._tokens >= self._job.off_policy_tokens:
                samples, signals = self._rollout(step.cartridge, data.curriculum.asked_batch(self._steps, spec), data)
            else:
                samples, signals = self._written(data.curriculum.written_batch(self._steps, spec), data)
            with self._timed("update"):
                update = step.run(samples, signals, prove_policy=on_policy, learning_rate_scale=scale)
            self._steps += 1
            self._tokens += update.num_tokens
            self._losses.append(update.loss)
            if self._tokens >= ahead[0]:
                ahead = [mark for mark in ahead if mark > self._tokens]
                self._mark(self._bench.measures.take(step.cartridge))

    def _written(self, batch: Sequence[Conversation], data: Data) -> tuple[list[Sample], list[Signal]]:
        """Answers that were there, each scored once, and proved to be whose they are said to be."""
        for each in batch:
            self._pay(each.family, each.prompt, data.answer_seconds.get((each.family, each.prompt), 0.0))
            if each.family == "question":
                self._pay("asked", each.prompt, data.question_seconds[each.prompt])
        samples = [Sample.written(each, f"step {self._steps + 1}, {each.family}") for each in batch]
        self._count(batch, samples)
        with self._timed("scoring"):
            fresh = list({each.key: each for each in samples if self._signals.get(each.key) is None}.values())
            scored = self._bench.teacher.signals(fresh)
            if fresh:
                prove_authors(self._lm, self._words, fresh, scored, _MISMATCH_THRESHOLD)
            for sample, signal in zip(fresh, scored, strict=True):
                self._signals.put(sample.key, signal)
            kept = [self._signals.get(each.key) for each in samples]
        return samples, [signal for signal in kept if signal is not None]

    def _rollout(
        self, cartridge: TrainableCartridge, batch: Sequence[Conversation], data: Data
    ) -> tuple[list[Sample], list[Signal]]:
        """The cartridge's own answers."""
        for each in batch:
            if each.family == "question":
                self._pay("asked", each.prompt, data.question_seconds[each.prompt])
            elif each.family == "general":
                # The product answers them before the first step, whoever answers later.
                self._pay(each.family, each.prompt, data.answer_seconds[each.family, each.prompt])
        prompts = [
            Prompt(each.turn_ids, derive_seed(self._job.seed, self._steps, place, 0))
            for place, each in enumerate(batch)
        ]
        with self._timed("rollout"):
            answers = self._bench.decoder.answer(
                prompts, cartridge.snapshot(), max_new_tokens=self._job.max_new_tokens, temperature=1.0
            )
        samples = [
            Sample(
                *(prompt.ids, answer.ids, answer.logprobs, f"policy {self._steps}", self._steps, answer.truncated),
                context=each.context,
            )
            for prompt, answer, each in zip(prompts, answers, batch, strict=True)
        ]
        self._count(batch, samples, "own ")
        with self._timed("scoring"):
            signals = self._bench.teacher.signals(samples)
        return samples, signals

    def _mark(self, found: Measured) -> None:
        measures = self._bench.measures
        self.marks.append(
            Mark(
                self._tokens,
                self._steps,
                sum(found.kl_sums) / sum(measures.question_tokens),
                found.general_kl,
                fmean(self._losses) if self._losses else None,
                [round(1000 * each) for each in found.kl_sums],
                as_text(found.right),
                {stage: round(seconds, 3) for stage, seconds in self._seconds.items()},
                dict(self._families),
            )
        )
        self._losses.clear()

    def _count(self, batch: Sequence[Conversation], samples: Sequence[Sample], whose: str = "") -> None:
        for each, sample in zip(batch, samples, strict=True):
            self._families[whose + each.family] += len(sample.answer_ids)

    def _pay(self, family: str, prompt: str, seconds: float) -> None:
        """What was written for several jobs counts for each that uses it, when it does first."""
        if (family, prompt) not in self._paid:
            self._paid.add((family, prompt))
            self._seconds["writing"] += seconds

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """All stages end by bringing something to the host, so that a GPU's work is in them."""
        began = time.perf_counter()
        yield
        self._seconds[stage] += time.perf_counter() - began


def as_text(flags: Sequence[bool]) -> str:
    return "".join("01"[flag] for flag in flags)
