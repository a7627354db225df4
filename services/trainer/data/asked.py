"""What may be asked about a run's documents, before anybody has answered: files, exercises, general prompts."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from foundry.errors import InvalidArgument
from foundry.model.initialise import share_tokens
from foundry.model.template import ChatTemplate
from foundry.seeds import derive_seed
from foundry.selfstudy.general import GENERAL_PROMPTS
from foundry.selfstudy.passages import VERBATIM, Exercise, evenly, exercises
from foundry.selfstudy.prompts import Line, read_lines
from foundry.selfstudy.wording import normalised
from foundry.store import RunSpec
from services.trainer.contexts import Context
from services.trainer.data.conversation import Conversation

# Enough for a mean over their tokens; more would only cost answers behind whole documents.
MAX_HELDOUT = 64
_NUM_GENERAL_HELDOUT = 8


@dataclass(frozen=True, slots=True)
class Asked:
    """A conversation before it is answered, and the document's own answer, or a file's, if that is the one to learn."""

    context: Context
    family: str
    prompt: str
    turn_ids: Sequence[int]
    kind: str = ""
    passage: int = 0
    passage_tokens: int = 0
    answer_ids: Sequence[int] = ()


class Prompts:
    """Without what is in `held`, by its words, once it is known what is held out."""

    def __init__(
        self,
        spec: RunSpec,
        template: ChatTemplate,
        tokenizer: PreTrainedTokenizerBase,
        contexts: Sequence[Context],
        bare: Context,
        passage_tokens: int,
        max_tokens: int,
    ) -> None:
        """`max_tokens` are the model's, for a context, a turn and its answer together."""
        self._spec, self._template, self._tokenizer = spec, template, tokenizer
        self._contexts, self._bare = contexts, bare
        self._passage_tokens, self.max_tokens = passage_tokens, max_tokens
        self.held: Collection[str] = ()

    def of_file(self, text: str, field: str) -> list[Asked]:
        """In the file's order, of lines that say the same the first."""
        found: dict[str, Line] = {}
        for line in read_lines(text, field=field):
            found.setdefault(normalised(line.prompt), line)
        lines = list(found.values())
        if field == "prompts":
            # No more than the steps can use: to render a turn takes long.
            lines = evenly(lines, self._spec.num_steps * self._spec.batch_size + MAX_HELDOUT)
        given = field == "prompts" and "given" in self._spec.families
        return [
            Asked(
                self._context_of(line, field),
                "prompts",
                line.prompt,
                self._template.turn(line.messages),
                answer_ids=self.answer_ids(line.answer) if given else (),
            )
            for line in lines
        ]

    def exercises(self, family: str, enough: int) -> list[Asked]:
        """At most `enough`, of each document by its length; without those that its model has no room for."""
        shares = share_tokens(enough, [len(context.ids) for context in self._contexts])
        return [
            Asked(
                context,
                family,
                exercise.prompt,
                turn_ids,
                passage=exercise.passage,
                passage_tokens=exercise.passage_tokens,
                answer_ids=answer_ids,
            )
            for context, share in zip(self._contexts, shares, strict=True)
            for exercise, answer_ids in evenly(self._different(family, context.text), share)
            if self.fits(context, turn_ids := self.turn(exercise.prompt))
        ]

    def general(self, enough: int) -> tuple[list[Asked], list[Asked]]:
        """Held out, and at most `enough` others, about no document."""
        prompts = [prompt for prompt in GENERAL_PROMPTS if normalised(prompt) not in self.held]
        random.Random(derive_seed(self._spec.seed, "general")).shuffle(prompts)
        heldout, rest = prompts[:_NUM_GENERAL_HELDOUT], prompts[_NUM_GENERAL_HELDOUT:][:enough]
        return (
            [Asked(self._bare, "general-heldout", prompt, self.turn(prompt)) for prompt in heldout],
            [Asked(self._bare, "general", prompt, self.turn(prompt)) for prompt in rest],
        )

    def again(self, row: Conversation, family: str) -> Asked:
        """What was asked once, to be answered."""
        context = next(context for context in self._contexts if context.digest == row.context)
        return Asked(context, family, row.prompt, row.turn_ids, row.kind, row.passage, row.passage_tokens)

    def turn(self, prompt: str) -> list[int]:
        return self._template.turn([{"role": "user", "content": prompt}])

    def fits(self, context: Context, turn_ids: Sequence[int]) -> bool:
        """Whether the model has room for the turn and an answer behind the document."""
        return len(context.ids) + len(turn_ids) + self._spec.max_new_tokens <= self.max_tokens

    def _different(self, family: str, document: str) -> list[tuple[Exercise, Sequence[int]]]:
        """With their answers, of which two that are cut at the same token may be one."""
        found: dict[tuple[str, tuple[int, ...]], Exercise] = {}
        for exercise in self._free(family, document):
            answer_ids = self.answer_ids(exercise.answer) if family in VERBATIM else []
            found.setdefault((exercise.prompt, tuple(answer_ids)), exercise)
        return [(exercise, answer_ids) for (_, answer_ids), exercise in found.items()]

    def _free(self, family: str, document: str) -> list[Exercise]:
        made = exercises(family, document, self._tokenizer, seed=self._spec.seed, passage_tokens=self._passage_tokens)
        return [exercise for exercise in made if normalised(exercise.prompt) not in self.held]

    def answer_ids(self, text: str) -> list[int]:
        """Words that are there as an answer, as long as a run's may be."""
        return self._template.text(text)[: self._spec.max_new_tokens]

    def _context_of(self, line: Line, field: str) -> Context:
        """Of several documents a line must say which it is about."""
        if len(self._contexts) == 1:
            return self._contexts[0]
        about = line.document
        for context in self._contexts:
            if context.document == about:
                return context
        raise InvalidArgument(
            f'{line.where}: "document" is {about!r}, where the run has several it must be the digest of one of them',
            field=field,
        )
