"""A conversation of a data set, and where it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# The document's own words, the model with the context before it, a file of prompts, or nobody: then the policy is to
# answer.
Author = Literal["document", "model", "file", ""]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A turn, and its answer where one is written."""

    # What it is of: an exercise, `prompts` of a file, `heldout`, `general`, and those of the latter that are held out.
    family: str
    # Of a question, what it asks for.
    kind: str
    prompt: str
    # Which passage of the document it is about, of how many tokens; 0 tokens where that is not known.
    passage: int
    passage_tokens: int
    turn_ids: Sequence[int]
    # Digest of the token ids that stand before the turn where it is answered, and scored.
    context: str
    author: Author = ""
    answer_ids: Sequence[int] = ()
    # Of a model's answer, as the rollout server computed them: untempered, natural log.
    logprobs: Sequence[float] = ()
    truncated: bool = False
