"""Where a run's prompts come from: files that users bring, or questions that the base model asks itself.

The held-out ones get their answers here, from the base model with the whole document in front of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence, Set
from dataclasses import dataclass

from foundry.errors import InvalidArgument
from foundry.model.lm import FrozenLM
from foundry.model.template import ChatTemplate
from foundry.rpc.rollout import Answer, Prompt, RolloutClient
from foundry.seeds import derive_seed
from foundry.selfstudy.passages import CLOZE_CUTS, cloze, evenly, recitations
from foundry.selfstudy.prompts import read_prompts
from foundry.selfstudy.questions import ROUND, write_prompts
from foundry.store import DocumentPrompts, Prompts
from services.trainer.attempt import Attempt
from services.trainer.curriculum import Curriculum, HeldOut, Written, hold_out


@dataclass(frozen=True, slots=True)
class CurriculumWriter:
    attempt: Attempt
    lm: FrozenLM
    template: ChatTemplate
    rollouts: RolloutClient
    # Length of the document's pieces that self-study asks about.
    chunk_tokens: int

    async def write(self, document: str, context: Sequence[int]) -> Curriculum:
        """`context` are the ids of the document. Raises InvalidArgument if no prompts are left to train on."""
        spec = self.attempt.spec
        turns: Sequence[list[int]] = []
        # What the cartridge is not asked nobody needs to write, but for what is held out of it.
        if spec.num_off_policy_steps < spec.num_steps or spec.heldout is None:
            turns = await self._turns(document, spec.prompts, "prompts")
        if spec.heldout is None:
            turns, heldout = hold_out(turns)
        else:
            heldout = await self._turns(document, spec.heldout, "heldout")
            # A prompt that is held out is never trained on, whoever wrote it.
            held = set(map(tuple, heldout))
            turns = [turn for turn in turns if tuple(turn) not in held]
        if not turns and spec.num_off_policy_steps < spec.num_steps:
            raise InvalidArgument("no training prompts are left beside the held-out ones: bring more", field="prompts")
        answers = await self._answers(heldout, context, "heldout", temperature=0.0)
        kept = [HeldOut(turn, answer) for turn, answer in zip(heldout, answers, strict=True)]
        written = await self._written(document, context, heldout) if spec.num_off_policy_steps else []
        return Curriculum(turns, kept, written)

    async def _written(self, document: str, context: Sequence[int], heldout: Sequence[list[int]]) -> list[Written]:
        """Of each family what the off-policy steps can use, about every part of the document."""
        recited, turns = await asyncio.to_thread(self._exercises, document, set(map(tuple, heldout)))
        answers = await self._answers(turns, context, "cloze", temperature=self.attempt.spec.temperature)
        completed = [Written(turn, answer, "cloze") for turn, answer in zip(turns, answers, strict=True)]
        if not (written := [*recited, *completed]):
            raise InvalidArgument(
                "the document is too short for exercises: use mode on, with a prompts file", field="mode"
            )
        return written

    def _exercises(self, document: str, held: Set[tuple[int, ...]]) -> tuple[list[Written], list[list[int]]]:
        """Recitations with their answers, and the turns of sentences to be completed; none of them is held out."""
        spec, tokenizer = self.attempt.spec, self.lm.tokenizer
        enough = -(-spec.num_off_policy_steps * spec.batch_size * spec.samples_per_prompt // 2)
        recited = [
            Written(self._turn(exercise.prompt), self._answer_ids(exercise.answer), "recite")
            for exercise in evenly(list(recitations(document, tokenizer)), enough)
        ]
        cut = cloze(document, tokenizer, CLOZE_CUTS, derive_seed(spec.seed, "cloze"))
        turns = [self._turn(exercise.prompt) for exercise in evenly(list(cut), enough)]
        return (
            [item for item in recited if tuple(item.turn_ids) not in held],
            [turn for turn in turns if tuple(turn) not in held],
        )

    def _turn(self, prompt: str) -> list[int]:
        return self.template.turn([{"role": "user", "content": prompt}])

    def _answer_ids(self, text: str) -> list[int]:
        ids: list[int] = self.lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids[: self.attempt.spec.max_new_tokens]

    async def _answers(
        self, turns: Sequence[list[int]], context: Sequence[int], family: str, *, temperature: float
    ) -> list[Sequence[int]]:
        """What the model says to each turn with the document before it."""
        seed, total, stage = self.attempt.spec.seed, len(turns), f"teacher answers ({family})"
        prompts = [Prompt([*context, *turn], derive_seed(seed, family, place)) for place, turn in enumerate(turns)]
        answers: list[Sequence[int]] = []
        await self._tell(stage, 0, total)
        for begin in range(0, total, ROUND):
            some = prompts[begin : begin + ROUND]
            asked = await self._ask(some, temperature=temperature, max_new_tokens=self.attempt.spec.max_new_tokens)
            answers += [answer.ids for answer in asked]
            await self._tell(stage, len(answers), total)
        return answers

    async def _turns(self, document: str, source: Prompts, field: str) -> list[list[int]]:
        if isinstance(source, DocumentPrompts):
            text = await self.attempt.document(source.digest)
            return [self.template.turn(messages) for messages in read_prompts(text, field=field)]

        async def ask(prompts: Sequence[Prompt]) -> list[Answer]:
            return await self._ask(prompts, temperature=0.8, max_new_tokens=source.max_prompt_tokens, stop=["\n"])

        async def progress(done: int) -> None:
            await self._tell("self-study", min(done, source.num_prompts), source.num_prompts)

        await progress(0)
        questions = await write_prompts(
            document,
            self.template,
            self.lm.tokenizer,
            ask,
            num_prompts=source.num_prompts,
            chunk_tokens=self.chunk_tokens,
            seed=derive_seed(self.attempt.spec.seed, field),
            progress=progress,
        )
        return [self._turn(question) for question in questions]

    async def _ask(
        self, prompts: Sequence[Prompt], *, temperature: float, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[Answer]:
        return await self.attempt.retry.call(
            "rollout",
            lambda: self.rollouts.ask_base(prompts, temperature=temperature, max_new_tokens=max_new_tokens, stop=stop),
        )

    async def _tell(self, stage: str, done: int, total: int) -> None:
        await self.attempt.tell({"type": "progress", "stage": stage, "done": done, "total": total})
