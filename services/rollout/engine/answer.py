"""The tokens of one answer as they come: their text, and when it ends."""

from __future__ import annotations

from collections.abc import Set

from services.rollout.engine import FinishReason, GrammarState, SamplingParams
from services.rollout.engine.detokenize import Decode, TextStream


class AnswerProgress:
    """Ends with an end token, a stop string, its grammar, or the most tokens that were asked for."""

    def __init__(self, sampling: SamplingParams, decode: Decode, eos_ids: Set[int]) -> None:
        self._text = TextStream(decode, () if sampling.min_tokens else sampling.stop)
        self._stop = sampling.stop
        self.end_ids = frozenset(() if sampling.ignore_eos else eos_ids).union(sampling.stop_token_ids)
        self.grammar: GrammarState | None = None
        if sampling.grammar is not None:
            self.grammar = sampling.grammar.begin()
            self._grammar_end = sampling.grammar.end_id
            self.end_ids |= {self._grammar_end}
        self._num_left = sampling.max_new_tokens
        # Where the text of the last token begins, in characters.
        self.text_offset = 0
        self._num_before_stop = sampling.min_tokens

    def append(self, token_id: int) -> tuple[str, FinishReason | None]:
        """Take a sampled token; returns the text that it completes and, if it was the last, why."""
        self._num_left -= 1
        if token_id in self.end_ids:
            text = self._text.flush()
            self.text_offset = self._text.num_characters
            # An engine that can't follow the grammar further has nothing else to say.
            refused = self.grammar is not None and token_id == self._grammar_end and not self.grammar.accept(token_id)
            return text, FinishReason.ERROR if refused else FinishReason.STOP
        text = self._text.push(token_id)
        self.text_offset = self._text.offset
        if self._num_before_stop:
            self._num_before_stop -= 1
            if not self._num_before_stop:
                self._text.stop = self._stop
        reason = self._reason(token_id)
        if reason is not None and not self._text.stopped:
            text += self._text.flush()
        return text, FinishReason.STOP if self._text.stopped else reason

    def _reason(self, token_id: int) -> FinishReason | None:
        """Why the answer ends here, stop strings aside."""
        if self.grammar is not None:
            if not self.grammar.accept(token_id):
                return FinishReason.ERROR
            if self.grammar.ended:
                return FinishReason.STOP
        return None if self._num_left else FinishReason.LENGTH
