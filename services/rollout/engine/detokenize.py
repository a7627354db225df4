"""Text of a growing list of token ids, in deltas that never split a character or show a part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from foundry.token_text import overlap

# What a decoder writes for bytes that are not, or not yet, a character.
_REPLACEMENT = "\ufffd"

Decode = Callable[[Sequence[int]], str]


class TextStream:
    """Deltas for one sequence. `decode` turns ids into text, special tokens left out."""

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self.stop = stop
        # Ids from the last two clean boundaries on: decoding from the first keeps what a tokenizer strips at the
        # start of a text (a leading space) out of the delta, which begins at the second.
        self._ids: list[int] = []
        self._num_read = 0
        self._read = ""
        # Text behind what was read that is not, or not yet, characters.
        self._open = ""
        # Text that is complete but may be the beginning of a stop string.
        self._held = ""
        self.stopped = False
        # Characters of the text so far, those held too.
        self.num_characters = 0
        # Where among them the text of the last token begins; tokens of one character share its place.
        self.offset = 0

    def push(self, token_id: int) -> str:
        """Text to show after one more token."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        new = text[len(self._read) :]
        self.offset = self.num_characters + self._beginning(token_id, new)
        if not new or new.endswith(_REPLACEMENT):
            self._open = new
            return ""
        return self._release(self._advance(text))

    def flush(self) -> str:
        """The rest, when no token follows: incomplete characters as the decoder writes them."""
        shown = self._release(self._advance(self._decode(self._ids)))
        rest, self._held = self._held, ""
        return shown + rest

    def _advance(self, text: str) -> str:
        """Move both boundaries past `text` and return what is new in it."""
        delta = text[len(self._read) :]
        self.num_characters += len(delta)
        self._open = ""
        self._ids = self._ids[self._num_read :]
        self._num_read = len(self._ids)
        self._read = self._decode(self._ids)
        return delta

    def _beginning(self, token_id: int, new: str) -> int:
        """Where in `new`, which was open text before this token, the token's own begins."""
        if not self._open:
            return 0
        begun = len(self._open.rstrip(_REPLACEMENT))
        # As many characters more as the token has alone: what was open is none of them.
        apart = len(new) - len(self._open) >= len(self._decode([token_id]))
        return len(self._open) if apart and len(new.rstrip(_REPLACEMENT)) > begun else begun

    def _release(self, delta: str) -> str:
        text = self._held + delta
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        num_held = max((overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]
