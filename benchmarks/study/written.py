"""What a job trains on: exercises, questions that the model asks itself, and general prompts, with their answers.

As `services.trainer.data.writer` has it, for one process without a store. Jobs of one document and seed share what is
decoded; each is charged for the answers that it uses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean

from benchmarks.study.cache import Cache
from benchmarks.study.decoding import Decoder
from benchmarks.study.job import Course, Job
from benchmarks.study.teacher import BARE, DOCUMENT, Teacher
from foundry.rpc.answers import Answer, Prompt
from foundry.seeds import derive_seed
from foundry.selfstudy.general import GENERAL_PROMPTS
from foundry.selfstudy.passages import VERBATIM, Exercise, evenly, exercises, pieces
from foundry.selfstudy.questions import (
    EVIDENCE_TOKENS,
    MAX_EVIDENCE_QUESTION_TOKENS,
    TOKENS_FOR_EVIDENCE,
    Questioner,
    StudyQuestion,
)
from foundry.selfstudy.wording import jumbled, normalised
from services.trainer.data.conversation import Conversation
from services.trainer.data.curriculum import Curriculum

# Of the document's tokens, as the trainer's settings have it; and of one question.
_PASSAGE_TOKENS = 96
_MAX_QUESTION_TOKENS = 128
# A short document is not worth more questions (`foundry.recipes`).
_TOKENS_FOR_A_QUESTION = 8
_QUESTIONS_TOGETHER = 128
# The same of all jobs, so that they can be compared: every sixth.
_GENERAL_HELDOUT = slice(None, None, 6)


@dataclass(frozen=True, slots=True)
class Written:
    """Conversations, and the seconds that each took to be made."""

    conversations: Sequence[Conversation]
    seconds: Sequence[float]


@dataclass(frozen=True, slots=True)
class Data:
    """What a job goes through, and what writing it costs: seconds by family and prompt."""

    curriculum: Curriculum
    course: Course
    answer_seconds: dict[tuple[str, str], float]
    question_seconds: dict[str, float]


def general_heldout() -> tuple[str, ...]:
    return GENERAL_PROMPTS[_GENERAL_HELDOUT]


class Writer:
    def __init__(self, teacher: Teacher, cache: Cache) -> None:
        self._teacher, self._cache = teacher, cache

    def data(self, job: Job, mean_heldout_tokens: float) -> Data:
        """Raises ValueError if nothing can be asked or written. Answers of a policy are taken to be as long as
        `mean_heldout_tokens` before there are any."""
        families = {family: self.family(family, job) for family in job.families} if job.off_policy_tokens else {}
        families = {family: written for family, written in families.items() if written.conversations}
        on_policy = job.off_policy_tokens < job.answer_tokens
        asked = self._asked(job.asked, job) if on_policy else []
        if not (families or asked) or (on_policy and not asked):
            raise ValueError(f"{job.document} is too short for exercises, or the model has no questions about it")
        means = [fmean(len(each.answer_ids) for each in written.conversations) for written in families.values()]
        course = Course.of(job, fmean(means) if means else min(mean_heldout_tokens, job.max_new_tokens))
        enough = -(-course.num_off_policy_steps * job.batch_size // max(1, len(families)))
        general = self._general(job) if job.general_share else Written((), ())
        needs_questions = "question" in families or (on_policy and job.asked == "question")
        questions = self.questions(job) if needs_questions else Written((), ())
        paid = (*families.values(), general)
        return Data(
            Curriculum(
                job.id,
                asked,
                [each for written in families.values() for each in evenly(written.conversations, enough)],
                heldout=(),
                general=general.conversations,
            ),
            course,
            {
                (each.family, each.prompt): seconds
                for written in paid
                for each, seconds in zip(written.conversations, written.seconds, strict=True)
            },
            {each.prompt: seconds for each, seconds in zip(questions.conversations, questions.seconds, strict=True)},
        )

    def family(self, family: str, job: Job) -> Written:
        """All of a family, in the document's order, none of it held out."""
        if family == "evidence":
            return self._evidence(job)
        asked = self._asked(family, job)
        return Written(asked, [0.0] * len(asked)) if family in VERBATIM else self._answered(asked, job)

    def questions(self, job: Job) -> Written:
        """What the model asks itself about the document."""
        wanted = min(job.num_questions, max(4, len(self._teacher.context_ids) // _TOKENS_FOR_A_QUESTION))
        return self._asking_itself("question", wanted, job, _PASSAGE_TOKENS, _MAX_QUESTION_TOKENS)

    def _evidence(self, job: Job) -> Written:
        """Questions about a sentence or two each, and these as their answers."""
        wanted = len(self._teacher.context_ids) // TOKENS_FOR_EVIDENCE
        asked = self._asking_itself("evidence", wanted, job, EVIDENCE_TOKENS, MAX_EVIDENCE_QUESTION_TOKENS)
        passages = pieces(self._teacher.document.text, self._teacher.lm.tokenizer, EVIDENCE_TOKENS)
        return Written(
            [self._in_its_words(each, passages[each.passage], job.max_new_tokens) for each in asked.conversations],
            asked.seconds,
        )

    def _asking_itself(
        self, family: str, wanted: int, job: Job, passage_tokens: int, max_question_tokens: int
    ) -> Written:
        def write() -> list[object]:
            found = asyncio.run(self._self_study(family, wanted, job.seed, passage_tokens, max_question_tokens))
            return [asdict(each) for each in found]

        made = self._cache.get("questions" if family == "question" else family, [*self._key(job), wanted], write)
        found = [StudyQuestion(**row) for row in made.content]
        conversations = [
            Conversation(
                *(family, each.kind, each.prompt, each.passage, each.passage_tokens),
                self._teacher.turn(each.prompt),
                DOCUMENT,
            )
            for each in found
        ]
        return Written(conversations, [made.seconds / max(1, len(found))] * len(found))

    def _asked(self, family: str, job: Job) -> list[Conversation]:
        if family == "question":
            return list(self.questions(job).conversations)
        document, tokenizer = self._teacher.document.text, self._teacher.lm.tokenizer
        return [
            self._asking(family, exercise, job.max_new_tokens)
            for exercise in exercises(family, document, tokenizer, seed=job.seed, passage_tokens=_PASSAGE_TOKENS)
            if normalised(exercise.prompt) not in self._held
        ]

    def _general(self, job: Job) -> Written:
        prompts = [
            prompt
            for prompt in GENERAL_PROMPTS
            if prompt not in general_heldout() and normalised(prompt) not in self._held
        ]
        asked = [Conversation("general", "", prompt, 0, 0, self._teacher.turn(prompt), BARE) for prompt in prompts]
        return self._answered(asked, job)

    @property
    def _held(self) -> frozenset[str]:
        return self._teacher.document.held

    def _key(self, job: Job) -> list[object]:
        teacher = self._teacher
        return [teacher.lm.spec.fingerprint, str(teacher.lm.dtype), teacher.document.text, job.seed]

    def _asking(self, family: str, exercise: Exercise, max_new_tokens: int) -> Conversation:
        """With the document's own words as the answer, where it is to be recited."""
        asked = Conversation(
            *(family, "", exercise.prompt, exercise.passage, exercise.passage_tokens),
            self._teacher.turn(exercise.prompt),
            DOCUMENT,
        )
        return self._in_its_words(asked, exercise.answer, max_new_tokens) if family in VERBATIM else asked

    def _in_its_words(self, asked: Conversation, answer: str, max_new_tokens: int) -> Conversation:
        ids = self._teacher.lm.tokenizer(answer, add_special_tokens=False)["input_ids"][:max_new_tokens]
        return replace(asked, author="document", answer_ids=ids, truncated=len(ids) == max_new_tokens)

    def _answered(self, asked: Sequence[Conversation], job: Job) -> Written:
        """Every one with the model's answer behind its context."""
        if not asked:
            return Written((), ())
        key = [*self._key(job), job.max_new_tokens, [each.prompt for each in asked]]

        def write() -> list[object]:
            found = self._teacher.answered(asked, max_new_tokens=job.max_new_tokens, temperature=1.0, seed=job.seed)
            return [asdict(each) for each in found]

        made = self._cache.get(f"{asked[0].family}-answers", key, write)
        conversations = [Conversation(**row) for row in made.content]
        total = sum(len(each.answer_ids) for each in conversations)
        return Written(conversations, [made.seconds * len(each.answer_ids) / total for each in conversations])

    async def _self_study(
        self, family: str, wanted: int, seed: int, passage_tokens: int, max_question_tokens: int
    ) -> list[StudyQuestion]:
        """As many different ones, none held out, or what the model finds in enough tries."""
        teacher = self._teacher
        questioner = Questioner(
            *(teacher.document.text, teacher.template, teacher.lm.tokenizer),
            num_questions=wanted,
            passage_tokens=passage_tokens,
            seed=derive_seed(seed, family, 0),
        )
        answer = partial(self._ask, max_question_tokens)
        found: dict[str, StudyQuestion] = {}
        tries = 0
        while len(found) < wanted and tries < questioner.max_tries:
            some = range(tries, tries + wanted - len(found))
            for each in await questioner.ask(some, answer):
                if normalised(each.prompt) not in self._held:
                    found.setdefault(jumbled(each.prompt), each)
            tries = some.stop
        return list(found.values())

    async def _ask(self, max_new_tokens: int, prompts: Sequence[Prompt]) -> list[Answer]:
        """The model without a document; its prompts are longer than all others, so they have places of their own."""
        decoder = Decoder(
            self._teacher.lm,
            max_sequences=min(len(prompts), _QUESTIONS_TOGETHER),
            max_sequence_tokens=max(len(prompt.ids) for prompt in prompts) + max_new_tokens,
        )
        return decoder.answer(prompts, None, max_new_tokens=max_new_tokens, temperature=0.8, stop=("\n",))
