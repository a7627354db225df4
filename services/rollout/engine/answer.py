"""The tokens of one answer as they come: their text, and when it ends."""

from __future__ import annotations

from collections.abc import Set

from services.rollout.engine import FinishReason, SamplingParams
from services.rollout.engine.detokenize import Decode, TextStream


class AnswerProgress:
    """Ends with an end token, a stop string, or the most tokens that were asked for."""

    def __init__(self, sampling: SamplingParams, decode: Decode, eos_ids: Set[int]) -> None:
        self._text = TextStream(decode, sampling.stop)
        self._eos_ids = frozenset() if sampling.ignore_eos else eos_ids
        self._num_left = sampling.max_new_tokens
        # Where the text of the last token begins, in characters.
        self.text_offset = 0

    def append(self, token_id: int) -> tuple[str, FinishReason | None]:
        """Take a sampled token; returns the text that it completes and, if it was the last, why."""
        self._num_left -= 1
        if token_id in self._eos_ids:
            text = self._text.flush()
            self.text_offset = self._text.num_characters
            return text, FinishReason.STOP
        text = self._text.push(token_id)
        self.text_offset = self._text.offset
        full = not self._num_left
        if full and not self._text.stopped:
            text += self._text.flush()
        if self._text.stopped:
            return text, FinishReason.STOP
        return text, FinishReason.LENGTH if full else None
