"""Writes a run's data set, family after family.

What stands is read and not written again: equal runs share a data set, and an attempt that was killed goes on behind
the last shard. What is held out comes first, and in no wording is it among the rest.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from foundry.errors import InvalidArgument
from foundry.identity import content_digest
from foundry.model.lm import FrozenLM
from foundry.model.template import ChatTemplate
from foundry.rpc.rollout import RolloutClient
from foundry.selfstudy.passages import VERBATIM, evenly, num_tokens
from foundry.selfstudy.wording import normalised
from foundry.store import DocumentPrompts, SelfStudyPrompts
from services.trainer.attempt import Attempt
from services.trainer.contexts import Context
from services.trainer.data.answers import Answers
from services.trainer.data.asked import MAX_HELDOUT, Asked, Prompts
from services.trainer.data.conversation import Conversation
from services.trainer.data.curriculum import Curriculum
from services.trainer.data.self_study import SelfStudy
from services.trainer.data.shards import Shards

# Another number for another meaning of the same settings: data sets are then written anew.
_FORMAT = 3
_DECISIVE = (
    *("prompts", "heldout", "families", "num_steps", "batch_size", "samples_per_prompt", "max_new_tokens"),
    *("temperature", "seed", "mode", "off_policy_share", "general_share"),
)
# Where no held-out prompts are given, one for so many of the others is held out, and at least so many.
_HELDOUT_SHARE = 8
_MIN_HELDOUT = 4


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
        self._attempt, self._spec, self._contexts, self._tokenizer = attempt, attempt.spec, contexts, lm.tokenizer
        decisive = {name: value for name, value in attempt.spec.model_dump().items() if name in _DECISIVE}
        digests = [context.digest for context in (*contexts, bare)]
        made_by = [_FORMAT, digests, lm.spec.fingerprint, template.digest, passage_tokens]
        self.dataset = content_digest(json.dumps([decisive, made_by], sort_keys=True).encode())
        self._prompts = Prompts(self._spec, template, lm.tokenizer, contexts, bare, passage_tokens, lm.spec.max_tokens)
        self._answers = Answers(attempt, rollouts)
        self._shards = Shards(attempt, self.dataset, lm.spec.fingerprint)
        self._self_study = SelfStudy(
            *(template, lm.tokenizer, contexts, passage_tokens), self._prompts, self._answers, self._shards
        )

    async def write(self) -> Curriculum:
        """Raises InvalidArgument if too little is left to train on."""
        spec = self._spec
        heldout, asked = await self._asked()
        self._prompts.held = {normalised(each.prompt) for each in heldout}
        answered = await self._shards.family("heldout", heldout, self._answers.of_the_model_greedily)
        asked = [each for each in asked if normalised(each.prompt) not in self._prompts.held]
        to_ask = await self._to_ask(asked) if spec.num_off_policy_steps < spec.num_steps or self._asks_written else []
        written = await self._written(to_ask, asked) if spec.num_off_policy_steps else []
        general, general_heldout = await self._general() if spec.general_share else ([], [])
        document_tokens = sum(num_tokens(context.text, self._tokenizer) for context in self._contexts)
        summary = await self._shards.finish(document_tokens)
        return Curriculum(summary.digest, to_ask, written, answered, general, general_heldout)

    @property
    def _asks_written(self) -> bool:
        return bool(self._spec.num_off_policy_steps) and "question" in self._spec.families

    async def _asked(self) -> tuple[list[Asked], list[Asked]]:
        """Held out, and of a file of prompts the others."""
        spec = self._spec
        filed = await self._filed(spec.prompts, "prompts") if isinstance(spec.prompts, DocumentPrompts) else []
        if isinstance(spec.heldout, DocumentPrompts):
            return await self._filed(spec.heldout, "heldout"), filed
        wanted = spec.heldout or (_fewer(spec.prompts) if isinstance(spec.prompts, SelfStudyPrompts) else None)
        if wanted is not None:
            return await self._self_study.questions(wanted, "heldout", spec.seed), filed
        num_heldout = min(max(_MIN_HELDOUT, len(filed) // _HELDOUT_SHARE), len(filed) // 2, MAX_HELDOUT)
        if not num_heldout:
            raise InvalidArgument("one prompt is too few to hold one out: bring more, or heldout", field="heldout")
        return filed[:num_heldout], filed[num_heldout:]

    async def _filed(self, source: DocumentPrompts, field: str) -> list[Asked]:
        text = await self._attempt.document(source.digest)
        return await asyncio.to_thread(self._prompts.of_file, text, field)

    async def _to_ask(self, filed: Sequence[Asked]) -> list[Conversation]:
        """For the policy, and for the model with the document where that answers questions too."""
        spec = self._spec
        if isinstance(spec.prompts, SelfStudyPrompts):
            filed = await self._self_study.questions(spec.prompts, "question", spec.seed)
        if not filed:
            raise InvalidArgument("no training prompts are left beside the held-out ones: bring more", field="prompts")
        enough = evenly(filed, spec.num_steps * spec.batch_size)
        return await self._shards.family("asked", enough, self._answers.of_nobody)

    async def _written(self, to_ask: Sequence[Conversation], filed: Sequence[Asked]) -> list[Conversation]:
        """Of each family what the off-policy steps can use, about every part of the documents."""
        spec = self._spec
        enough = -(-spec.num_off_policy_steps * spec.batch_size * spec.samples_per_prompt // len(spec.families))
        written: list[Conversation] = []
        for family in spec.families:
            if family == "question":
                asked = evenly([self._prompts.again(each, family) for each in to_ask], enough)
            elif family == "given":
                asked = evenly(self._given(filed), enough)
            elif family == "evidence":
                asked = await self._self_study.evidence(enough, spec.seed)
            else:
                asked = await asyncio.to_thread(self._prompts.exercises, family, enough)
            written += await self._shards.family(family, asked, self._who_answers(family))
        if not written:
            raise InvalidArgument(
                "the document is too short for exercises, or leaves the model no room for them: use mode on, with a "
                "prompts file",
                field="mode",
            )
        return written

    def _given(self, filed: Sequence[Asked]) -> list[Asked]:
        """What has an answer that the model has room for. Raises InvalidArgument if nothing has."""
        found = [
            replace(each, family="given")
            for each in filed
            if each.answer_ids and self._prompts.fits(each.context, each.turn_ids)
        ]
        if not found:
            raise InvalidArgument(
                "no line of the prompts that are not held out has an answer: `messages` that end with the assistant's, "
                "or a `completion`",
                field="prompts",
            )
        return found

    def _who_answers(self, family: str) -> Callable[[Sequence[Asked]], Awaitable[list[Conversation]]]:
        if family in VERBATIM:
            return self._answers.of_the_document
        return self._answers.of_the_file if family == "given" else self._answers.of_the_model

    async def _general(self) -> tuple[list[Conversation], list[Conversation]]:
        """Prompts about nothing in particular, answered by the model as it is; some of them held out."""
        spec = self._spec
        enough = int(spec.num_steps * spec.batch_size * spec.samples_per_prompt * spec.general_share)
        heldout, rest = self._prompts.general(enough)
        answered = await self._shards.family("general", rest, self._answers.of_the_model)
        return answered, await self._shards.family("general-heldout", heldout, self._answers.of_the_model_greedily)


def _fewer(prompts: SelfStudyPrompts) -> SelfStudyPrompts:
    """Held-out questions beside those of a run, where it brings none."""
    num_prompts = min(max(_MIN_HELDOUT, prompts.num_prompts // _HELDOUT_SHARE), MAX_HELDOUT)
    return prompts.model_copy(update={"num_prompts": num_prompts})
