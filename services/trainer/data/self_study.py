"""Questions that the model asks itself about each document, until there are as many as wanted."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from foundry.errors import InvalidArgument
from foundry.model.initialise import share_tokens
from foundry.model.template import ChatTemplate
from foundry.rpc.answers import Answer, Prompt
from foundry.seeds import derive_seed
from foundry.selfstudy.questions import (
    EVIDENCE_TOKENS,
    MAX_EVIDENCE_QUESTION_TOKENS,
    TOKENS_FOR_EVIDENCE,
    Questioner,
)
from foundry.selfstudy.wording import jumbled, normalised
from foundry.store import SelfStudyPrompts
from services.trainer.contexts import Context
from services.trainer.data.answers import Answers
from services.trainer.data.asked import Asked, Prompts
from services.trainer.data.conversation import Conversation
from services.trainer.data.shards import ROUND, Shards

# Sampled: of one passage several questions are asked.
_TEMPERATURE = 0.8


class SelfStudy:
    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: PreTrainedTokenizerBase,
        contexts: Sequence[Context],
        passage_tokens: int,
        prompts: Prompts,
        answers: Answers,
        shards: Shards,
    ) -> None:
        self._template, self._tokenizer = template, tokenizer
        self._contexts, self._passage_tokens = contexts, passage_tokens
        self._prompts, self._answers, self._shards = prompts, answers, shards

    async def questions(self, wanted: SelfStudyPrompts, family: str, seed: int) -> list[Asked]:
        """As many as wanted, none that is held out, of longer documents more. Raises InvalidArgument."""
        found = await self._ask(wanted, family, seed, self._passage_tokens)
        if len(found) < wanted.num_prompts:
            raise InvalidArgument(
                f"the base model wrote {len(found)} different questions about the document, {wanted.num_prompts} were "
                "asked for: ask for fewer, or bring a prompts file",
                field="prompts.num_prompts",
            )
        return [asked for asked, _ in found]

    async def evidence(self, most: int, seed: int) -> list[Asked]:
        """Questions about a sentence or two each, and these as their answers: as many as the documents are worth and
        the model has room for and finds, at most `most`."""
        worth = sum(len(context.ids) for context in self._contexts) // TOKENS_FOR_EVIDENCE
        wanted = SelfStudyPrompts(num_prompts=max(1, min(most, worth)), max_prompt_tokens=MAX_EVIDENCE_QUESTION_TOKENS)
        room = self._prompts.max_tokens - MAX_EVIDENCE_QUESTION_TOKENS
        return [
            replace(asked, answer_ids=self._prompts.answer_ids(passage))
            for asked, passage in await self._ask(wanted, "evidence", seed, EVIDENCE_TOKENS, room)
            if self._prompts.fits(asked.context, asked.turn_ids)
        ]

    async def _ask(
        self,
        wanted: SelfStudyPrompts,
        family: str,
        seed: int,
        passage_tokens: int,
        max_request_tokens: int | None = None,
    ) -> list[tuple[Asked, str]]:
        """Questions and the passages they are about; no two of the same words."""
        shares = share_tokens(wanted.num_prompts, [len(context.ids) for context in self._contexts])
        found: dict[str, tuple[Asked, str]] = {}
        for place, (context, share) in enumerate(zip(self._contexts, shares, strict=True)):
            if share:
                # It reads the whole document.
                questioner = await asyncio.to_thread(
                    Questioner,
                    context.text,
                    self._template,
                    self._tokenizer,
                    num_questions=share,
                    passage_tokens=passage_tokens,
                    seed=derive_seed(seed, family, place),
                    max_request_tokens=max_request_tokens,
                )
                await self._ask_about(context, place, questioner, len(found) + share, wanted, family, found)
        await self._shards.tell("self-study", len(found), wanted.num_prompts)
        return list(found.values())

    async def _ask_about(
        self,
        context: Context,
        place: int,
        questioner: Questioner,
        enough: int,
        wanted: SelfStudyPrompts,
        family: str,
        found: dict[str, tuple[Asked, str]],
    ) -> None:
        """Add to `found`, by their words, until there are `enough` or tries run out."""

        async def answer(prompts: Sequence[Prompt]) -> list[Answer]:
            most = wanted.max_prompt_tokens
            return await self._answers.ask(prompts, temperature=_TEMPERATURE, max_new_tokens=most, stop=["\n"])

        async def make(tries: range) -> list[Conversation]:
            questions = await questioner.ask(tries, answer)
            turns = [self._prompts.turn(question.prompt) for question in questions]
            asked = [
                Asked(context, family, each.prompt, turn, each.kind, each.passage, each.passage_tokens)
                for each, turn in zip(questions, turns, strict=True)
            ]
            return await self._answers.of_nobody(asked)

        tries = shard = 0
        while len(found) < enough and tries < questioner.max_tries:
            await self._shards.tell("self-study", len(found), wanted.num_prompts)
            some = range(tries, tries + min(ROUND, enough - len(found)))
            for row in await self._shards.one(f"{family}-tries-{place}", shard, partial(make, some)):
                if normalised(row.prompt) not in self._prompts.held:
                    asked = self._prompts.again(row, family)
                    found.setdefault(jumbled(row.prompt), (asked, questioner.passages[row.passage]))
            tries, shard = some.stop, shard + 1
