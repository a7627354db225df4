"""Writes a run's data set, family by family and shard by shard.

Whatever stands is read and not written again: equal runs share a data set, and an attempt that was killed goes on
behind the last shard. What is held out comes first, and in no wording is it among the rest.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from foundry.errors import InvalidArgument
from foundry.identity import content_digest
from foundry.model.initialise import share_tokens
from foundry.model.lm import FrozenLM
from foundry.model.template import ChatTemplate
from foundry.rpc.answers import Answer, Prompt
from foundry.rpc.rollout import RolloutClient
from foundry.seeds import derive_seed
from foundry.selfstudy.general import GENERAL_PROMPTS
from foundry.selfstudy.passages import CLOZE_CUTS, Exercise, cloze, evenly, num_tokens, recitations, summaries
from foundry.selfstudy.prompts import Line, read_lines
from foundry.selfstudy.questions import Questioner
from foundry.selfstudy.wording import jumbled, normalised
from foundry.store import DatasetSummary, DocumentPrompts, SelfStudyPrompts
from services.trainer.attempt import Attempt
from services.trainer.contexts import Context
from services.trainer.data.conversation import Conversation
from services.trainer.data.curriculum import Curriculum

# Another number for another meaning of the same settings: data sets are then written anew.
_FORMAT = 1
# Conversations of a shard, which are asked for together.
_ROUND = 32
# Where no held-out prompts are given, one for so many of the others is held out: at least four, and never more than
# are enough for the mean over their tokens.
_HELDOUT_SHARE = 8
_MIN_HELDOUT = 4
MAX_HELDOUT = 64
_GENERAL_HELDOUT = 8
_DECISIVE = (
    *("prompts", "heldout", "families", "num_steps", "batch_size", "samples_per_prompt", "max_new_tokens"),
    *("temperature", "seed", "mode", "off_policy_share"),
)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A conversation before it is answered, and the document's own answer if that is the one to learn."""

    context: Context
    family: str
    prompt: str
    turn_ids: list[int]
    kind: str = ""
    passage: int = 0
    passage_tokens: int = 0
    answer_ids: Sequence[int] = ()


class DatasetWriter:
    def __init__(
        self,
        attempt: Attempt,
        lm: FrozenLM,
        template: ChatTemplate,
        rollouts: RolloutClient,
        *,
        contexts: Sequence[Context],
        bare: Context,
        passage_tokens: int,
    ) -> None:
        """`bare` is the context without a document; questions are about passages of `passage_tokens`."""
        self._attempt, self._spec = attempt, attempt.spec
        self._lm, self._template, self._rollouts = lm, template, rollouts
        self._contexts, self._bare, self._passage_tokens = contexts, bare, passage_tokens
        decisive = {name: value for name, value in attempt.spec.model_dump().items() if name in _DECISIVE}
        digests = [context.digest for context in (*contexts, bare)]
        made_by = [_FORMAT, digests, attempt.spec.general_share, lm.spec.fingerprint, template.digest, passage_tokens]
        self.dataset = content_digest(json.dumps([decisive, made_by], sort_keys=True).encode())
        self._rows: list[Conversation] = []
        self._held: set[str] = set()

    async def write(self) -> Curriculum:
        """Raises InvalidArgument if too little is left to train on."""
        spec = self._spec
        heldout, asked = await self._prompts()
        written = await self._written(asked) if spec.num_off_policy_steps else []
        general, general_heldout = await self._general() if spec.general_share else ([], [])
        summary = await self._finish()
        await self._attempt.tell(
            {"type": "dataset", "dataset": self.dataset, "digest": summary.digest, "families": summary.families}
        )
        return Curriculum(summary.digest, asked, written, heldout, general, general_heldout)

    # What is asked

    async def _prompts(self) -> tuple[list[Conversation], list[Conversation]]:
        """Held out, with the teacher's greedy answers; and those for the policy, in no wording of the former."""
        spec = self._spec
        needs_asked = spec.num_off_policy_steps < spec.num_steps or "question" in spec.families
        filed = await self._filed(spec.prompts, "prompts") if isinstance(spec.prompts, DocumentPrompts) else []
        if isinstance(spec.heldout, DocumentPrompts):
            heldout = await self._filed(spec.heldout, "heldout")
        elif spec.heldout is not None:
            heldout = await self._self_study(spec.heldout, "heldout")
        elif isinstance(spec.prompts, SelfStudyPrompts):
            heldout = await self._self_study(_fewer(spec.prompts), "heldout")
        else:
            num_heldout = min(max(_MIN_HELDOUT, len(filed) // _HELDOUT_SHARE), len(filed) // 2, MAX_HELDOUT)
            heldout, filed = filed[:num_heldout], filed[num_heldout:]
        if not heldout:
            raise InvalidArgument("one prompt is too few to hold one out: bring more, or heldout", field="heldout")
        self._held = {normalised(item.prompt) for item in heldout}
        answered = await self._family("heldout", heldout, partial(self._answered, temperature=0.0))
        if not needs_asked:
            return answered, []
        if isinstance(spec.prompts, DocumentPrompts):
            asked = [item for item in filed if normalised(item.prompt) not in self._held]
        else:
            asked = await self._self_study(spec.prompts, "question")
        if not asked:
            raise InvalidArgument("no training prompts are left beside the held-out ones: bring more", field="prompts")
        enough = spec.num_steps * spec.batch_size
        return answered, await self._family("asked", evenly(asked, enough), self._unanswered)

    async def _filed(self, source: DocumentPrompts, field: str) -> list[_Asked]:
        text = await self._attempt.document(source.digest)
        return await asyncio.to_thread(self._read, text, field)

    def _read(self, text: str, field: str) -> list[_Asked]:
        """In the file's order, of those that say the same the first; to train on no more than the steps can use."""
        found: dict[str, Line] = {}
        for line in read_lines(text, field=field):
            found.setdefault(normalised(line.prompt), line)
        lines = list(found.values())
        if field == "prompts":
            lines = evenly(lines, self._spec.num_steps * self._spec.batch_size + MAX_HELDOUT)
        return [
            _Asked(self._context_of(line, field), "prompts", line.prompt, self._template.turn(line.messages))
            for line in lines
        ]

    def _context_of(self, line: Line, field: str) -> Context:
        """Of several documents a line must say which it is about."""
        if len(self._contexts) == 1:
            return self._contexts[0]
        about = line.row.get("document")
        for context in self._contexts:
            if context.document == about:
                return context
        raise InvalidArgument(
            f'{line.where}: "document" is {about!r}, where the run has several it must be the digest of one of them',
            field=field,
        )

    async def _self_study(self, source: SelfStudyPrompts, family: str) -> list[_Asked]:
        """Questions that the model asks itself about each document, the longer ones more often."""
        shares = share_tokens(source.num_prompts, [len(context.ids) for context in self._contexts])
        found: dict[str, _Asked] = {}
        for place, (context, num_questions) in enumerate(zip(self._contexts, shares, strict=True)):
            if num_questions:
                await self._question(context, place, source, num_questions, family, found)
        if len(found) < source.num_prompts:
            raise InvalidArgument(
                f"the base model wrote {len(found)} different questions about the document, {source.num_prompts} were "
                "asked for: ask for fewer, or bring a prompts file",
                field="prompts.num_prompts",
            )
        await self._tell("self-study", len(found), source.num_prompts)
        return list(found.values())

    async def _question(
        self,
        context: Context,
        place: int,
        source: SelfStudyPrompts,
        num_questions: int,
        family: str,
        found: dict[str, _Asked],
    ) -> None:
        """Add to `found`, by their words, `num_questions` about a document, or what the model finds in enough tries."""
        questioner = Questioner(
            context.text,
            self._template,
            self._lm.tokenizer,
            num_questions=num_questions,
            passage_tokens=self._passage_tokens,
            seed=derive_seed(self._spec.seed, family, place),
        )

        async def answer(prompts: Sequence[Prompt]) -> list[Answer]:
            return await self._ask(prompts, temperature=0.8, max_new_tokens=source.max_prompt_tokens, stop=["\n"])

        async def make(tries: range) -> list[Conversation]:
            questions = await questioner.ask(tries, answer)
            turns = [self._turn(question.prompt) for question in questions]
            asked = [
                _Asked(context, family, each.prompt, turn, each.kind, each.passage, each.passage_tokens)
                for each, turn in zip(questions, turns, strict=True)
            ]
            return await self._unanswered(asked)

        enough, tries, shard = len(found) + num_questions, 0, 0
        while len(found) < enough and tries < questioner.max_tries:
            await self._tell("self-study", len(found), source.num_prompts)
            some = range(tries, tries + min(_ROUND, enough - len(found)))
            for row in await self._shard(f"{family}-tries-{place}", shard, partial(make, some)):
                if normalised(row.prompt) not in self._held:
                    found.setdefault(jumbled(row.prompt), self._again(row, family))
            tries, shard = some.stop, shard + 1

    def _again(self, row: Conversation, family: str) -> _Asked:
        """What was asked, to be answered."""
        context = next(context for context in self._contexts if context.digest == row.context)
        return _Asked(context, family, row.prompt, list(row.turn_ids), row.kind, row.passage, row.passage_tokens)

    # What is answered before the first step

    async def _written(self, asked: Sequence[Conversation]) -> list[Conversation]:
        """Of each family what the off-policy steps can use, about every part of the document."""
        spec = self._spec
        enough = -(-spec.num_off_policy_steps * spec.batch_size * spec.samples_per_prompt // len(spec.families))
        written: list[Conversation] = []
        for family in spec.families:
            exercises = await asyncio.to_thread(self._exercises, family, asked, enough)
            answer = self._recited if family == "recite" else self._answered
            written += await self._family(family, exercises, answer)
        if not written:
            raise InvalidArgument(
                "the document is too short for exercises: use mode on, with a prompts file", field="mode"
            )
        return written

    def _exercises(self, family: str, asked: Sequence[Conversation], enough: int) -> list[_Asked]:
        """At most `enough`, of each document by its length, and none of them held out."""
        if family == "question":
            return evenly([self._again(each, family) for each in asked], enough)
        shares = share_tokens(enough, [len(context.ids) for context in self._contexts])
        return [
            _Asked(
                context,
                family,
                exercise.prompt,
                self._turn(exercise.prompt),
                passage=exercise.passage,
                passage_tokens=exercise.passage_tokens,
                answer_ids=self._answer_ids(exercise.answer) if exercise.answer else (),
            )
            for context, share in zip(self._contexts, shares, strict=True)
            for exercise in evenly(self._free(family, context.text), share)
        ]

    def _free(self, family: str, document: str) -> list[Exercise]:
        tokenizer = self._lm.tokenizer
        made: Iterable[Exercise]
        if family == "recite":
            made = recitations(document, tokenizer)
        elif family == "cloze":
            made = cloze(document, tokenizer, CLOZE_CUTS, derive_seed(self._spec.seed, "cloze"))
        else:
            made = summaries(document, tokenizer, self._passage_tokens)
        return [exercise for exercise in made if normalised(exercise.prompt) not in self._held]

    async def _general(self) -> tuple[list[Conversation], list[Conversation]]:
        """Prompts about nothing in particular, answered by the model as it is; some of them held out."""
        spec = self._spec
        prompts = [prompt for prompt in GENERAL_PROMPTS if normalised(prompt) not in self._held]
        random.Random(derive_seed(spec.seed, "general")).shuffle(prompts)
        heldout, rest = (
            [_Asked(self._bare, family, prompt, self._turn(prompt)) for prompt in some]
            for family, some in (
                ("general-heldout", prompts[:_GENERAL_HELDOUT]),
                ("general", prompts[_GENERAL_HELDOUT:]),
            )
        )
        enough = int(spec.num_steps * spec.batch_size * spec.samples_per_prompt * spec.general_share)
        answered = await self._family("general", rest[:enough], self._answered)
        greedily = partial(self._answered, temperature=0.0)
        return answered, await self._family("general-heldout", heldout, greedily)

    # Shards

    async def _family(
        self, family: str, asked: Sequence[_Asked], make: Callable[[Sequence[_Asked]], Awaitable[list[Conversation]]]
    ) -> list[Conversation]:
        """All of a family, a shard at a time."""
        rows: list[Conversation] = []
        for number, begin in enumerate(range(0, len(asked), _ROUND)):
            await self._tell(family, begin, len(asked))
            rows += await self._shard(family, number, partial(make, asked[begin : begin + _ROUND]))
        await self._tell(family, len(asked), len(asked))
        self._rows += rows
        return rows

    async def _shard(
        self, family: str, number: int, make: Callable[[], Awaitable[list[Conversation]]]
    ) -> list[Conversation]:
        """What stands; else what is made, or what another attempt wrote meanwhile."""
        rows = await self._attempt.read_shard(self.dataset, family, number)
        if rows is None:
            rows = await self._attempt.append_shard(
                self.dataset, family, number, [asdict(each) for each in await make()]
            )
        return [Conversation(**row) for row in rows]

    async def _finish(self) -> DatasetSummary:
        document_tokens = sum(num_tokens(context.text, self._lm.tokenizer) for context in self._contexts)
        families: dict[str, dict[str, float]] = {}
        for row in self._rows:
            counts = families.setdefault(row.family, {"conversations": 0, "answer_tokens": 0, "coverage": 0.0})
            counts["conversations"] += 1
            counts["answer_tokens"] += len(row.answer_ids)
            # How often each of the document's tokens is in a passage that is asked about, on average.
            counts["coverage"] += row.passage_tokens / document_tokens
        content = json.dumps([asdict(row) for row in self._rows]).encode()
        summary = DatasetSummary(content_digest(content), families)
        return await self._attempt.finish_dataset(self.dataset, summary)

    # Who answers

    async def _recited(self, asked: Sequence[_Asked]) -> list[Conversation]:
        most = self._spec.max_new_tokens
        return [
            self._conversation(
                each, author="document", answer_ids=each.answer_ids, truncated=len(each.answer_ids) == most
            )
            for each in asked
        ]

    async def _unanswered(self, asked: Sequence[_Asked]) -> list[Conversation]:
        return [self._conversation(each) for each in asked]

    async def _answered(self, asked: Sequence[_Asked], *, temperature: float | None = None) -> list[Conversation]:
        """What the model says to each turn behind its context."""
        # By its words: a draw does not depend on what else is asked.
        prompts = [
            Prompt([*each.context.ids, *each.turn_ids], derive_seed(self._spec.seed, each.family, each.prompt))
            for each in asked
        ]
        answers = await self._ask(
            prompts,
            temperature=self._spec.temperature if temperature is None else temperature,
            max_new_tokens=self._spec.max_new_tokens,
        )
        return [
            self._conversation(
                each,
                author="model",
                answer_ids=list(answer.ids),
                logprobs=list(answer.logprobs),
                truncated=answer.truncated,
            )
            for each, answer in zip(asked, answers, strict=True)
        ]

    def _conversation(self, asked: _Asked, **answer: Any) -> Conversation:
        return Conversation(
            asked.family,
            asked.kind,
            asked.prompt,
            asked.passage,
            asked.passage_tokens,
            asked.turn_ids,
            asked.context.digest,
            **answer,
        )

    def _turn(self, prompt: str) -> list[int]:
        return self._template.turn([{"role": "user", "content": prompt}])

    def _answer_ids(self, text: str) -> list[int]:
        ids: list[int] = self._lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids[: self._spec.max_new_tokens]

    async def _ask(
        self, prompts: Sequence[Prompt], *, temperature: float, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[Answer]:
        return await self._attempt.retry.call(
            "rollout",
            lambda: self._rollouts.ask_base(prompts, temperature=temperature, max_new_tokens=max_new_tokens, stop=stop),
        )

    async def _tell(self, stage: str, done: int, total: int) -> None:
        await self._attempt.tell({"type": "progress", "stage": stage, "done": done, "total": total})


def _fewer(prompts: SelfStudyPrompts) -> SelfStudyPrompts:
    """Held-out questions beside those of a run, where it brings none."""
    num_prompts = min(max(_MIN_HELDOUT, prompts.num_prompts // _HELDOUT_SHARE), MAX_HELDOUT)
    return prompts.model_copy(update={"num_prompts": num_prompts})
