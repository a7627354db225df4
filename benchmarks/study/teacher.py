"""The model with a whole document before it, or with none: what it answers, and what it says of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from benchmarks.study.decoding import Decoder, as_cartridge
from benchmarks.study.document import StudyDocument
from foundry.model.lm import FrozenLM
from foundry.model.packing import micro_batches
from foundry.model.template import ChatTemplate
from foundry.rpc.answers import Prompt
from foundry.seeds import derive_seed
from services.teacher.scorer import Item, Want, score
from services.trainer.data.conversation import Conversation
from services.trainer.sample import Sample
from services.trainer.update.gradient import Signal

# What stands before a turn, as `Conversation.context` names it.
DOCUMENT, BARE = "document", "bare"
# What a forward holds for the backward is, of each answer, the whole prefix in every layer.
MICRO_BATCH_TOKENS = 2048
# What templates take for today, as the services' settings have it.
CLOCK = datetime(2024, 7, 26, tzinfo=UTC)


class Teacher:
    def __init__(self, lm: FrozenLM, document: StudyDocument, decoder: Decoder) -> None:
        self.lm, self.document, self.template = lm, document, ChatTemplate(lm.tokenizer, CLOCK)
        self._decoder = decoder
        self.context_ids = self.template.context(document.text, max_tokens=lm.spec.max_tokens)
        self._bare_ids = self.template.bare()
        self._contexts_L2GPD = {DOCUMENT: lm.prefill(self.context_ids), BARE: lm.prefill(self._bare_ids)}

    def turn(self, prompt: str) -> list[int]:
        return self.template.turn([{"role": "user", "content": prompt}])

    def answered(
        self, asked: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seed: int = 0
    ) -> list[Conversation]:
        """The conversations, all behind the same context, with what the model says there."""
        if not asked:
            return []
        # A document is read once for all; what a template writes without one is short, and may be nothing.
        bare = asked[0].context == BARE
        prompts = [
            Prompt(
                [*(self._bare_ids if bare else ()), *each.turn_ids],
                # By its words: a draw does not depend on what else is asked.
                derive_seed(seed, each.family, each.prompt),
            )
            for each in asked
        ]
        cartridge = None if bare else as_cartridge(self.lm, self._contexts_L2GPD[DOCUMENT])
        answers = self._decoder.answer(prompts, cartridge, max_new_tokens=max_new_tokens, temperature=temperature)
        return [
            replace(
                each,
                author="model",
                answer_ids=list(answer.ids),
                logprobs=list(answer.logprobs),
                truncated=answer.truncated,
            )
            for each, answer in zip(asked, answers, strict=True)
        ]

    def signals(self, samples: Sequence[Sample]) -> list[Signal]:
        """Hidden states [N, E] along each sample's answer, behind its own context."""
        items = [Item(sample.context, sample.ids, sample.score_from) for sample in samples]
        contexts = [self._contexts_L2GPD[sample.context] for sample in samples]
        scores = [
            scored
            for some in micro_batches(items, MICRO_BATCH_TOKENS)
            for scored in score(self.lm, items[some], contexts[some], Want(hidden=True)).result()
        ]
        return [each.hidden_NE for each in scores if each.hidden_NE is not None]
