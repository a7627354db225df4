"""Who answers: nobody yet, the document in its own words, a file, or the model with the context before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foundry.rpc.answers import Answer, Prompt
from foundry.rpc.rollout import RolloutClient
from foundry.seeds import derive_seed
from services.trainer.attempt import Attempt
from services.trainer.data.asked import Asked
from services.trainer.data.conversation import Author, Conversation


class Answers:
    def __init__(self, attempt: Attempt, rollouts: RolloutClient) -> None:
        self._retry, self._spec, self._rollouts = attempt.retry, attempt.spec, rollouts

    async def of_nobody(self, asked: Sequence[Asked]) -> list[Conversation]:
        return [_conversation(each) for each in asked]

    async def of_the_document(self, asked: Sequence[Asked]) -> list[Conversation]:
        return self._as_they_are(asked, "document")

    async def of_the_file(self, asked: Sequence[Asked]) -> list[Conversation]:
        return self._as_they_are(asked, "file")

    async def of_the_model(self, asked: Sequence[Asked]) -> list[Conversation]:
        return await self._of_the_model(asked, self._spec.temperature)

    async def of_the_model_greedily(self, asked: Sequence[Asked]) -> list[Conversation]:
        return await self._of_the_model(asked, 0.0)

    async def ask(
        self, prompts: Sequence[Prompt], *, temperature: float, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[Answer]:
        """Of the plain model, whatever stands in the prompts."""
        return await self._retry.call(
            "rollout",
            lambda: self._rollouts.ask_base(prompts, temperature=temperature, max_new_tokens=max_new_tokens, stop=stop),
        )

    def _as_they_are(self, asked: Sequence[Asked], author: Author) -> list[Conversation]:
        most = self._spec.max_new_tokens
        return [
            _conversation(each, author=author, answer_ids=each.answer_ids, truncated=len(each.answer_ids) == most)
            for each in asked
        ]

    async def _of_the_model(self, asked: Sequence[Asked], temperature: float) -> list[Conversation]:
        # By its words: a draw does not depend on what else is asked.
        prompts = [
            Prompt([*each.context.ids, *each.turn_ids], derive_seed(self._spec.seed, each.family, each.prompt))
            for each in asked
        ]
        answers = await self.ask(prompts, temperature=temperature, max_new_tokens=self._spec.max_new_tokens)
        return [
            _conversation(
                each,
                author="model",
                answer_ids=list(answer.ids),
                logprobs=list(answer.logprobs),
                truncated=answer.truncated,
            )
            for each, answer in zip(asked, answers, strict=True)
        ]


def _conversation(asked: Asked, **answer: Any) -> Conversation:
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
