"""Written answers: their signals come from a cache with the bits of a fresh score, and who wrote them is proved."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from foundry.errors import PolicyMismatch
from foundry.identity import ids_digest
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective, TopK
from foundry.selfstudy.wording import normalised
from foundry.store import RunSpec
from services.teacher.scorer import Item, ItemScores, Want, score
from services.trainer.attempt import Attempt
from services.trainer.contexts import Context
from services.trainer.data.conversation import Conversation
from services.trainer.data.curriculum import Curriculum
from services.trainer.policy import Policy
from services.trainer.sample import Sample
from services.trainer.signal_cache import SignalCache
from services.trainer.signals import Teachers
from services.trainer.sources.off_policy import OffPolicy
from services.trainer.stages import Stages
from services.trainer.update.authorship import prove_authors
from services.trainer.update.gradient import Signal, join
from tests.conversations import conversation
from tests.store_data import run_spec
from tests.tiny import build_tiny_model
from tests.unit.test_dataset import Retrying

DOCUMENT = "The harbour is open again. The treaty was signed in the spring. The price of grain is twelve."
# Nobody asks it.
POLICY = cast(Policy, None)
EXACT, TOPK = Objective("forward_kl"), Objective("topk", k=4)
# Three epochs over ten answers, which fit into no step evenly.
SPEC = run_spec(mode="off", num_steps=8, batch_size=4)
PLENTY = 2**30


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> FrozenLM:
    return FrozenLM.load(build_tiny_model(tmp_path_factory.mktemp("model")))


class ScoringTeachers:
    """The real scorer, whose bits depend on what is scored together; it counts the answers."""

    def __init__(self, lm: FrozenLM, context: Sequence[int]) -> None:
        self._lm, self._kv = lm, lm.prefill(context)
        self.num_scored = 0

    async def signals(self, samples: Sequence[Sample], objective: Objective) -> list[Signal]:
        self.num_scored += len(samples)
        items = [Item("", sample.ids, sample.score_from) for sample in samples]
        want = Want(hidden=True) if objective.needs_hidden else Want(topk=objective.k)
        return [_signal(each) for each in score(self._lm, items, [self._kv] * len(items), want).result()]


def _signal(scores: ItemScores) -> Signal:
    if scores.hidden_NE is not None:
        return scores.hidden_NE
    ids, logprobs, tail = scores.topk_ids_NK, scores.topk_logprobs_NK, scores.tail_logprob_N
    assert ids is not None
    assert logprobs is not None
    assert tail is not None
    return TopK(ids.long(), logprobs, tail)


class OneAttempt:
    def __init__(self, spec: RunSpec) -> None:
        self.spec, self.retry = spec, Retrying()


class Case:
    """Ten answers that the model wrote behind a context, some of them the document's own words."""

    def __init__(self, lm: FrozenLM) -> None:
        self.lm = lm
        draw = random.Random(2)

        def ids(count: int) -> list[int]:
            return [draw.randrange(3, 380) for _ in range(count)]

        self.context = ids(60)
        digest = ids_digest(self.context)
        recited = lm.tokenizer("The treaty was signed in the", add_special_tokens=False)["input_ids"]
        written = [
            conversation(ids(3 + i), recited, family="recite", context=digest, author="document") for i in range(4)
        ]
        for number in range(6):
            turn, answer = ids(4 + number), ids(5 + number)
            hidden = lm.packed_hidden([[*turn, *answer][:-1]], [lm.prefill(self.context)])[len(turn) - 1 :]
            logprobs = lm.logits(hidden).log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].tolist()
            written.append(
                conversation(turn, answer, logprobs=logprobs, family="cloze", context=digest, author="model")
            )
        self.written: list[Conversation] = written

    def source(self, objective: Objective = EXACT, memory_bytes: int = PLENTY, disk_bytes: int = 0) -> OffPolicy:
        self.teachers, self.cache = ScoringTeachers(self.lm, self.context), SignalCache(memory_bytes, disk_bytes)
        attempt, teachers = cast(Attempt, OneAttempt(SPEC)), cast(Teachers, self.teachers)
        curriculum = Curriculum("", [], self.written, [])
        contexts = [Context("", DOCUMENT, self.context)]
        return OffPolicy(attempt, self.lm, contexts, curriculum, teachers, self.cache, objective)


@pytest.fixture(scope="module")
def case(lm: FrozenLM) -> Case:
    with torch.no_grad():
        return Case(lm)


def bits(signals: Sequence[Signal]) -> list[Tensor]:
    joined = join(signals, torch.device("cpu"))
    return [joined.ids_NK, joined.logprobs_NK, joined.tail_logprob_N] if isinstance(joined, TopK) else [joined]


async def steps(source: OffPolicy, begin: int = 0) -> list[list[Tensor]]:
    found = []
    for step in range(begin, SPEC.num_steps):
        samples = await source.samples(step, POLICY, Stages())
        found.append(bits(await source.signals(step, samples)))
    return found


def equal(first: Sequence[Sequence[Tensor]], second: Sequence[Sequence[Tensor]]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, b) for left, right in pairs for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("objective", [EXACT, TOPK])
async def test_signals_from_the_cache_are_those_of_a_fresh_score(case: Case, objective: Objective) -> None:
    source = case.source(objective)
    cached = await steps(source)
    assert case.teachers.num_scored < 3 * len(case.written), "answers that come up again were scored again"
    # Nothing is kept: every one is scored freshly, each time it comes up.
    fresh = await steps(case.source(objective, 0, 0))
    assert case.teachers.num_scored > 3 * len(case.written)
    assert equal(cached, fresh)


async def test_every_answer_is_scored_once(case: Case) -> None:
    source = case.source()
    await steps(source)
    # In the steps of the first epoch, of which the last has answers of the second too.
    assert case.teachers.num_scored <= len(case.written) + SPEC.batch_size
    before = case.teachers.num_scored
    await steps(source)
    assert case.teachers.num_scored == before


@pytest.mark.parametrize("objective", [EXACT, TOPK])
async def test_what_memory_does_not_hold_is_on_disk_with_the_same_bits(case: Case, objective: Objective) -> None:
    expected = await steps(case.source(objective))
    first = (await case.source(objective).samples(0, POLICY, Stages()))[:1]
    one_answer = sum(each.nbytes for each in bits(await case.source(objective).signals(0, first)))
    source = case.source(objective, 2 * one_answer, PLENTY)
    assert equal(await steps(source), expected)
    assert case.cache._files
    assert case.cache._memory
    directory = next(iter(case.cache._files.values())).parent
    case.cache.close()
    assert not directory.exists()


@pytest.mark.parametrize("begin", [1, 3, 6])
async def test_an_attempt_that_begins_later_gets_the_same_bits(case: Case, begin: int) -> None:
    expected = await steps(case.source())
    assert equal(await steps(case.source(), begin), expected[begin:])


# Who wrote them


async def proved(case: Case, objective: Objective = EXACT, claimed: float | None = None, **changes: Any) -> None:
    """With every logprob of one of the model's answers as `claimed`, and one of the document's with `changes`."""
    samples = [sample for step in range(3) for sample in await case.source(objective).samples(step, POLICY, Stages())]
    modelled = next(place for place, sample in enumerate(samples) if sample.rollout_logprobs)
    recited = next(place for place, sample in enumerate(samples) if not sample.rollout_logprobs)
    if claimed is not None:
        logprobs = [claimed] * len(samples[modelled].answer_ids)
        samples[modelled] = replace(samples[modelled], rollout_logprobs=logprobs)
    samples[recited] = replace(samples[recited], **changes)
    signals = await case.teachers.signals(samples, objective)
    prove_authors(case.lm, {ids_digest(case.context): normalised(DOCUMENT)}, samples, signals, 1e-4)


@pytest.mark.parametrize("objective", [EXACT, TOPK])
async def test_what_the_model_wrote_behind_the_document_is_believed(case: Case, objective: Objective) -> None:
    await proved(case, objective)


@pytest.mark.parametrize("objective", [EXACT, TOPK])
async def test_logprobs_of_another_context_are_refused(case: Case, objective: Objective) -> None:
    with pytest.raises(PolicyMismatch, match="claim the model behind context"):
        # As likely as no token is among several hundred.
        await proved(case, objective, claimed=-0.01)


async def test_nan_is_refused(case: Case) -> None:
    with pytest.raises(PolicyMismatch, match="nan"):
        await proved(case, claimed=float("nan"))


async def test_words_that_are_not_the_documents_are_refused(case: Case, lm: FrozenLM) -> None:
    other = lm.tokenizer("The treaty was broken in the", add_special_tokens=False)["input_ids"]
    with pytest.raises(PolicyMismatch, match="do not stand in it"):
        await proved(case, answer_ids=other)


async def test_the_last_word_of_an_answer_may_be_cut(case: Case, lm: FrozenLM) -> None:
    cut = lm.tokenizer("The treaty was signed in the spr", add_special_tokens=False)["input_ids"]
    await proved(case, answer_ids=cut, truncated=True)
    with pytest.raises(PolicyMismatch):
        await proved(
            case,
            answer_ids=lm.tokenizer("The treaty was broken in", add_special_tokens=False)["input_ids"],
            truncated=True,
        )
