"""The rows of a data set as they are kept, in the order that its digest has them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from foundry.validation import Checked, Number

# As they stand in what is hashed.
KEYS = (
    *("family", "kind", "prompt", "passage", "passage_tokens", "turn_ids", "context", "author", "answer_ids"),
    *("logprobs", "truncated"),
)


class ConversationRow(Checked):
    """A turn, and its answer where one is written. Ids are tokens; logprobs are natural and of the answer's tokens."""

    family: str
    kind: str
    prompt: str
    passage: int
    passage_tokens: int
    turn_ids: list[int]
    context: str
    author: Literal["document", "model", "file", ""]
    answer_ids: list[int]
    logprobs: list[Number]
    truncated: bool


class ContentDigest:
    """Of all conversations, in their order: what a data set is believed by."""

    def __init__(self) -> None:
        from blake3 import blake3

        self._hasher, self._begun = blake3(b"["), False

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            text = json.dumps({key: row[key] for key in KEYS})
            self._hasher.update(f"{', ' if self._begun else ''}{text}".encode())
            self._begun = True

    @property
    def value(self) -> str:
        whole = self._hasher.copy()
        whole.update(b"]")
        return f"blake3:{whole.hexdigest()}"


def parts_of(families: Sequence[str]) -> tuple[str, ...]:
    """What the shards of a data set are of, in the order of its rows: held out, to be answered by the policy, written
    in each of the run's `families`, and about no document."""
    return ("heldout", "asked", *families, "general", "general-heldout")
