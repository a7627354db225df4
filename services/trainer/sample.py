"""What is trained on, and the signs that it degenerates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foundry.identity import ids_digest
from foundry.rpc.answers import Answer, Prompt
from services.trainer.data.conversation import Conversation

if TYPE_CHECKING:
    from foundry.store import CartridgeId


@dataclass(frozen=True, slots=True)
class Sample:
    """A turn and its answer. `digest` names what it was decoded with: a version's bytes, or a context's tokens."""

    turn_ids: Sequence[int]
    answer_ids: Sequence[int]
    # Of the answer's tokens, as the rollout server computed them: untempered, natural log. None of a document's words.
    rollout_logprobs: Sequence[float]
    digest: str
    # 0 if it is no version's.
    version: int
    truncated: bool
    # Address of the rollout server that answered, and the prompt's place: whom to look at when the proof fails.
    server: str = ""
    place: str = ""
    # Digest of the teacher's context.
    context: str = ""
    # Whether the answer is the document's own words.
    verbatim: bool = False

    @classmethod
    def of(cls, prompt: Prompt, answer: Answer, policy: CartridgeId, context: str) -> Sample:
        """`answer` is what the policy gave to `prompt`."""
        return cls(
            prompt.ids,
            answer.ids,
            answer.logprobs,
            policy.digest,
            policy.version,
            answer.truncated,
            server=answer.server,
            place=prompt.place,
            context=context,
        )

    @classmethod
    def written(cls, conversation: Conversation, place: str) -> Sample:
        """Of an answer that is no policy's."""
        return cls(
            conversation.turn_ids,
            conversation.answer_ids,
            conversation.logprobs,
            conversation.context,
            0,
            conversation.truncated,
            place=place,
            context=conversation.context,
            verbatim=conversation.author == "document",
        )

    @property
    def key(self) -> str:
        """What the teacher's word on it depends on."""
        return f"{self.context}/{self.score_from}/{ids_digest(self.ids)}"

    @property
    def ids(self) -> list[int]:
        return [*self.turn_ids, *self.answer_ids]

    @property
    def score_from(self) -> int:
        return len(self.turn_ids)


@dataclass(frozen=True, slots=True)
class Guards:
    """Signs that answers degenerate: shares are of samples, lengths in tokens."""

    truncated: float
    mean_length: float
    # Share of 4-grams that occurred before in the same answer.
    repetition: float

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Guards:
        lengths = [len(sample.answer_ids) for sample in samples]
        return cls(
            truncated=sum(sample.truncated for sample in samples) / len(samples),
            mean_length=sum(lengths) / len(lengths),
            repetition=sum(_repetition(sample.answer_ids) for sample in samples) / len(samples),
        )


def _repetition(ids: Sequence[int]) -> float:
    grams = Counter(tuple(ids[start : start + 4]) for start in range(len(ids) - 3))
    total = sum(grams.values())
    return (total - len(grams)) / total if total else 0.0
