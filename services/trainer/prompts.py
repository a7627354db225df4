"""Where a run's prompts come from: files that users bring, or questions that the base model asks itself.

The held-out ones get their answers here, from the base model with the whole document in front of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foundry.errors import InvalidArgument
from foundry.model.lm import FrozenLM
from foundry.model.template import ChatTemplate
from foundry.rpc.rollout import Answer, Prompt, RolloutClient
from foundry.seeds import derive_seed
from foundry.selfstudy.prompts import read_prompts
from foundry.selfstudy.questions import write_prompts
from foundry.store import DocumentPrompts, Prompts
from services.trainer.attempt import Attempt
from services.trainer.curriculum import Curriculum, HeldOut, hold_out


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
        turns: Sequence[list[int]] = await self._turns(document, spec.prompts, "prompts")
        if spec.heldout is None:
            turns, heldout = hold_out(turns)
        else:
            heldout = await self._turns(document, spec.heldout, "heldout")
            # A prompt that is held out is never trained on, whoever wrote it.
            held = set(map(tuple, heldout))
            turns = [turn for turn in turns if tuple(turn) not in held]
        if not turns:
            raise InvalidArgument("no training prompts are left beside the held-out ones: bring more", field="prompts")
        answers = await self._answers(heldout, context)
        return Curriculum(turns, [HeldOut(turn, answer.ids) for turn, answer in zip(heldout, answers, strict=True)])

    async def _answers(self, heldout: Sequence[list[int]], context: Sequence[int]) -> list[Answer]:
        seed, total = self.attempt.spec.seed, len(heldout)
        prompts = [Prompt([*context, *turn], derive_seed(seed, "heldout", place)) for place, turn in enumerate(heldout)]
        await self._tell("teacher answers", 0, total)
        answers = await self._ask(prompts, temperature=0.0, max_new_tokens=self.attempt.spec.max_new_tokens)
        await self._tell("teacher answers", total, total)
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
        return [self.template.turn([{"role": "user", "content": question}]) for question in questions]

    async def _ask(
        self, prompts: Sequence[Prompt], *, temperature: float, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[Answer]:
        return await self.attempt.retry.call(
            "rollout",
            lambda: self.rollouts.ask_base(prompts, temperature=temperature, max_new_tokens=max_new_tokens, stop=stop),
        )

    async def _tell(self, stage: str, done: int, total: int) -> None:
        await self.attempt.tell({"type": "progress", "stage": stage, "done": done, "total": total})
