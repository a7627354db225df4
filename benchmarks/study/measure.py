"""How good a cartridge is: its divergence from the whole document and the right answers, question by question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import torch

from benchmarks.study.cache import Cache
from benchmarks.study.decoding import Decoder
from benchmarks.study.document import MAX_NEW_TOKENS
from benchmarks.study.teacher import BARE, DOCUMENT, MICRO_BATCH_TOKENS, Teacher
from benchmarks.study.written import general_heldout
from foundry.model.cartridge import TrainableCartridge
from foundry.rpc.answers import Prompt
from services.trainer.data.conversation import Conversation
from services.trainer.sample import Sample
from services.trainer.update.heldout import HeldOutSet

# Of the teacher's greedy answers, along which divergences are measured.
_HELDOUT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Measured:
    # Of each question: KL(teacher || student) summed over the answer's tokens, in nats, and whether it was answered.
    kl_sums: Sequence[float]
    right: Sequence[bool]
    # Nats a token, on prompts about no document.
    general_kl: float


class Measures:
    """Fixed answers of the teacher to every question, and to general prompts that nothing is trained on."""

    def __init__(self, teacher: Teacher, decoder: Decoder, cache: Cache) -> None:
        self._teacher, self._decoder = teacher, decoder
        questions = teacher.document.questions
        asked = [
            Conversation("heldout", "", each.text, 0, 0, teacher.template.turn(each.messages), DOCUMENT)
            for each in questions
        ]
        general = [Conversation("general", "", each, 0, 0, teacher.turn(each), BARE) for each in general_heldout()]

        def write() -> list[list[object]]:
            return [
                [asdict(each) for each in teacher.answered(some, max_new_tokens=_HELDOUT_TOKENS, temperature=0.0)]
                for some in (asked, general)
            ]

        key = [
            teacher.lm.spec.fingerprint,
            str(teacher.lm.dtype),
            teacher.document.text,
            [each.text for each in questions],
        ]
        answered, general_answered = (
            [Conversation(**row) for row in rows] for rows in cache.get("heldout", key, write).content
        )
        self.heldout, self._general = (self._set(some) for some in (answered, general_answered))
        self.question_tokens = [len(each.answer_ids) for each in answered]
        texts = [teacher.lm.info.text(list(each.answer_ids)) for each in answered]
        self.teacher_right = [each.is_right(text) for each, text in zip(questions, texts, strict=True)]

    @property
    def mean_answer_tokens(self) -> float:
        return fmean(self.question_tokens)

    def take(self, cartridge: TrainableCartridge) -> Measured:
        lm, questions = self._teacher.lm, self._teacher.document.questions
        kl_N = self.heldout.token_kl(lm, cartridge).double()
        prompts = [Prompt(sample.turn_ids, seed=0) for sample in self.heldout.samples]
        answers = self._decoder.answer(prompts, cartridge.snapshot(), max_new_tokens=MAX_NEW_TOKENS)
        return Measured(
            [each.sum().item() for each in torch.split(kl_N, self.question_tokens)],
            [question.is_right(answer.text) for question, answer in zip(questions, answers, strict=True)],
            self._general.distance(lm, cartridge).kl,
        )

    def _set(self, conversations: Sequence[Conversation]) -> HeldOutSet:
        found = HeldOutSet([Sample.written(each, each.family) for each in conversations], MICRO_BATCH_TOKENS)
        found.signals = self._teacher.signals(found.samples)
        return found
