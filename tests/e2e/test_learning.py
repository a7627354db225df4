"""Distillation teaches the document that the teacher reads, and nothing else, whoever writes the answers."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from foundry.model.cartridge import TrainableCartridge
from foundry.model.initialise import cut_context
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective
from foundry.model.template import ChatTemplate
from foundry.seeds import derive_seed
from services.rollout.engine import SamplingParams, SequenceRequest
from services.rollout.engine.torch.engine import TorchEngine
from services.teacher.scorer import Item, Want, score
from services.trainer.sample import Sample
from services.trainer.update.gradient import Signal
from services.trainer.update.heldout import HeldOutSet
from services.trainer.update.step import TrainingStep
from tests.tiny import CLOCK, build_tiny_model

P, STEPS, BATCH, NEW_TOKENS = 24, 25, 8, 16
WORDS = (
    "harbour treaty spring grain price congress union message president document state answer".split()  # noqa: SIM905
)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> FrozenLM:
    return FrozenLM.load(build_tiny_model(tmp_path_factory.mktemp("llama")))


def synthetic_document(seed: int) -> str:
    chooser = random.Random(seed)
    return " ".join(chooser.choice(WORDS) for _ in range(40))


def turns(template: ChatTemplate, seed: int, count: int) -> list[list[int]]:
    chooser = random.Random(seed)
    questions = [" ".join(chooser.choices(WORDS, k=3)) + "?" for _ in range(count)]
    return [template.turn([{"role": "user", "content": question}]) for question in questions]


class Setting:
    """A document's teacher, an engine and held-out answers that the teacher wrote."""

    def __init__(self, lm: FrozenLM, document: str) -> None:
        self.lm = lm
        self.template = ChatTemplate(lm.tokenizer, CLOCK)
        self.context = self.template.context(document)
        self.context_kv = lm.prefill(self.context)
        self.engine = TorchEngine(lm, max_sequences=BATCH, max_sequence_tokens=512, prefill_tokens_per_step=512)
        heldout = turns(self.template, seed=99, count=6)
        answers = self.answer([[*self.context, *turn] for turn in heldout], (), temperature=0.0, seed=0)
        pairs = zip(heldout, answers, strict=True)
        samples = [Sample(turn, ids, logprobs, "", 0, truncated=False) for turn, (ids, logprobs) in pairs]
        self.heldout = HeldOutSet(samples, micro_batch_tokens=4096)
        self.heldout.signals = self.teach(self.heldout.samples)

    def answer(
        self, prompts: Sequence[Sequence[int]], digests: tuple[str, ...], *, temperature: float, seed: int
    ) -> list[tuple[list[int], list[float]]]:
        answers: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
        self.engine.admit(
            {
                index: SequenceRequest(
                    tuple(prompt),
                    digests,
                    SamplingParams(NEW_TOKENS, temperature=temperature, seed=derive_seed(seed, index)),
                    skip_prefix_cache=True,
                )
                for index, prompt in enumerate(prompts)
            }
        )
        while self.engine.stats().num_running or self.engine.stats().num_waiting:
            for output in self.engine.step():
                answers[output.sequence_id][0].append(output.token_id)
                answers[output.sequence_id][1].append(output.logprob)
        return answers

    def teach(self, samples: Sequence[Sample]) -> list[Signal]:
        items = [Item("", sample.ids, sample.score_from) for sample in samples]
        scores = score(self.lm, items, [self.context_kv] * len(items), Want(hidden=True)).result()
        return [each.hidden_NE for each in scores if each.hidden_NE is not None]


def train(student: Setting, teacher: Setting, objective: str, off_policy_steps: int = 0) -> tuple[float, float]:
    """Held-out KL to the student's own document before and after training on what `teacher` says.

    In the first steps on its own answers, behind its document; then on the student's.
    """
    lm = student.lm
    start = lm.prefill(cut_context(student.context, student.template.closing, P))
    cartridge = TrainableCartridge(lm, start)
    step = TrainingStep(
        lm,
        cartridge,
        Objective(objective),  # type: ignore[arg-type]
        learning_rate=0.05,
        micro_batch_tokens=4096,
        policy_mismatch_threshold=1e-6,
    )
    before = student.heldout.distance(lm, cartridge).kl
    prompts = turns(student.template, seed=5, count=64)
    for index in range(STEPS):
        digest = str(index)
        batch = [prompts[(index * BATCH + place) % len(prompts)] for place in range(BATCH)]
        if off_policy := index < off_policy_steps:
            behind = [[*teacher.context, *turn] for turn in batch]
            answers = teacher.answer(behind, (), temperature=1.0, seed=index)
        else:
            student.engine.load(digest, cartridge.snapshot())
            answers = student.answer(batch, (digest,), temperature=1.0, seed=index)
            student.engine.unload(digest)
        samples = [
            Sample(turn, ids, logprobs, digest, index, truncated=False)
            for turn, (ids, logprobs) in zip(batch, answers, strict=True)
        ]
        step.run(samples, teacher.teach(samples), prove_policy=not off_policy)
    return before, student.heldout.distance(lm, cartridge).kl


MODES = {"on": 0, "off": STEPS, "hybrid": STEPS // 2}


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "jsd"])
def test_heldout_kl_falls(lm: FrozenLM, objective: str) -> None:
    setting = Setting(lm, synthetic_document(1))
    before, after = train(setting, setting, objective)
    assert after < 0.6 * before


def test_what_is_imitated_is_learnt(lm: FrozenLM) -> None:
    setting = Setting(lm, synthetic_document(1))
    before, after = train(setting, setting, "nll", off_policy_steps=STEPS)
    assert after < 0.8 * before


@pytest.mark.parametrize("off_policy_steps", MODES.values(), ids=MODES)
def test_a_shuffled_document_teaches_nothing_of_the_real_one(lm: FrozenLM, off_policy_steps: int) -> None:
    # Letter by letter: to a random model a document is little more than the set of its tokens.
    letters = list(synthetic_document(1))
    random.Random(3).shuffle(letters)
    real, shuffled = Setting(lm, synthetic_document(1)), Setting(lm, "".join(letters))
    before, after = train(real, shuffled, "forward_kl", off_policy_steps)
    _, after_real = train(real, real, "forward_kl", off_policy_steps)
    assert after > 0.9 * before
    assert after_real < 0.6 * before
